"""Modules that keep their state on themselves, as modules that are given it and return it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tbptt_ckpt.arguments import checked
from tbptt_ckpt.errors import ArgumentError, first_line, shown
from tbptt_ckpt.module.ambient import untouched
from tbptt_ckpt.module.attributes import Attributes
from tbptt_ckpt.module.hidden_state import HiddenState, find_hidden_state, with_gradient
from tbptt_ckpt.module.inside import is_compiled, name_of
from tbptt_ckpt.module.places import (
    ABSENT,
    Place,
    let_go_of_graphs,
    on_copies,
    places_in,
    without_graph,
)
from tbptt_ckpt.module.trees import (
    Tree,
    copy_containers,
    detach_state,
    is_differentiable,
    map_tensors,
    tensors_of,
)

_NUM_STEPS = 3


class Lifted(nn.Module):
    """A module with its state lifted out: `(input, state) -> (output, state)`; `lifted` makes it.

    A state is a tuple of what stands in each place, in the order of `names`. None stands for what
    the module holds when it is called, so that a reset of the module's own is the first state. A
    call leaves the module as it was, but for buffers that are no state and what was to be left.

    Attributes:
        module: The one that was given.
        names: Where it keeps its state, such as "lif1.mem".
    """

    def __init__(self, module: nn.Module, hidden: HiddenState) -> None:
        super().__init__()
        self.module = module
        self._hidden = hidden

    @property
    def names(self) -> tuple[str, ...]:
        """Where the module keeps its state."""
        return tuple(map(str, self._hidden.state))

    def forward(self, inputs: Tree, state: Tree) -> tuple[Tree, Tree]:
        """Run the module from a state; what it leaves is the state after it."""
        places = self._hidden.places
        holders = [place.holder(self.module) for place in places]
        found = [each.get(place.name, ABSENT) for place, each in zip(places, holders, strict=True)]
        try:
            given = map(self._own, places, self._given(found, state))
            self._put(places, holders, given)
            outputs, last = self.module(inputs), zip(self._hidden.state, holders, strict=False)
            return outputs, tuple([holder[place.name] for place, holder in last])
        finally:
            self._put(places, holders, found)

    def _put(self, places: list[Place], holders: list[Any], values: Iterable[Tree]) -> None:
        for place, holder, value in zip(places, holders, values, strict=True):
            if value is ABSENT:
                place.put(self.module, value)
            else:
                holder[place.name] = value

    def _given(self, found: list[Tree], state: Tree) -> list[Tree]:
        """What a step begins with in each place."""
        hidden = self._hidden
        if state is None:
            return [map_tensors(without_graph, value) for value in found]
        if not (isinstance(state, tuple | list) and _fits(state, found[: len(hidden.state)])):
            raise ArgumentError(
                f"state={shown(state)} must be a tuple of what module={name_of(self.module)} keeps "
                f"in {', '.join(self.names)}, or None for what stands there"
            )
        last = len(hidden.state) + len(hidden.scratch)
        return [*state, *found[len(hidden.state) : last], *hidden.flags.values()]

    def _own(self, place: Place, value: Tree) -> Tree:
        """What the step may write into: the containers, and tensors where it does so."""
        if place in self._hidden.written:
            return map_tensors(Tensor.clone, value)
        return value if isinstance(value, Tensor) else copy_containers(value)

    def extra_repr(self) -> str:
        """Where the state is."""
        return f"state: {', '.join(self.names)}"


@checked
def lifted(module: nn.Module, inputs: Tree, *, leave: Sequence[str] = ()) -> Lifted:
    """A module that keeps its recurrent state in attributes or buffers, as one that is given it.

    The state is found by running a few steps: what a step changes, what carries a gradient, and
    what the next step reads. Buffers without a gradient (running statistics) stay what they are,
    and what is written but not read (a last attention map) is put back after each call. Whatever
    else changes is refused by name. The result is held against the module itself over a few
    steps; module, buffers and random generators are left as they were, but for graphs of earlier
    steps in attributes, which are let go.

    Args:
        module: Takes one step, or a segment of steps, and returns outputs alone. It is used, not
            copied: the result trains its weights. What it holds is the state before the first
            step; reset it beforehand, as its library says, where it was used.
        inputs: Those of one call: tensors nested in any way.
        leave: Names of attributes, such as "encoder.count", that change and are to be left alone:
            no result depends on them. They see every run of a step, recomputed ones too.

    Returns:
        A module whose states are tuples of what stands in each of its `names`.

    Raises:
        ArgumentError: The module keeps no state, or something that can neither be lifted nor put
            back; or it does not run with such inputs.
    """
    let_go_of_graphs(module)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        # Compiled modules inside run as they are written.
        torch.compiler.set_stance("force_eager") if is_compiled(module) else nullcontext(),
        untouched(module, tensors=tensors_of(inputs)) as start_over,
    ):
        try:
            with on_copies(module):
                hidden = find_hidden_state(module, inputs, leave)
        except ArgumentError:
            raise
        except Exception as error:  # of a module of the user's
            raise ArgumentError(
                f"inputs={shown(inputs)} must be what one call of module={name_of(module)} takes; "
                f"it raised {first_line(error)}"
            ) from error
        made = Lifted(module, hidden)
        _hold_against(made, inputs, leave, start_over)
    return made


def _hold_against(
    made: Lifted, inputs: Tree, leave: Sequence[str], start_over: Callable[[], None]
) -> None:
    """Raise `ArgumentError` unless it gives what the module gives, and leaves nothing behind."""
    module, name = made.module, name_of(made.module)
    start_over()
    with on_copies(module):
        expected = [tensors_of(module(with_gradient(inputs))) for _ in range(_NUM_STEPS)]
    start_over()
    with on_copies(module):
        left = [(p, p.get(module)) for p in places_in(module) if str(p) in leave]
        for place, value in left:
            place.put(module, copy_containers(value))
        attributes, state = Attributes(module), None
        for outputs in expected:
            got, state = made(with_gradient(inputs), detach_state(state))
            if not all(map(_is_near, outputs, tensors_of(got))):
                raise ArgumentError(
                    f"module={name} gives other outputs where {', '.join(made.names)} is handed "
                    "from step to step: it has more state, which was not found"
                )
        for place, value in left:
            place.put(module, value)
        changed = attributes.changed(but_weights=True)
    if changed is not None and changed not in leave:
        raise ArgumentError(
            f"module={name} changes {changed} in a step, which cannot be put back; keep what "
            "passes from step to step in tensors, lists, dicts or dataclasses in attributes, or "
            f"give leave=[{changed!r}] if no result depends on it"
        )


def _fits(state: Sequence[Tree], found: Sequence[Tree]) -> bool:
    """Whether there is one for each place, and a dict or list where one stands."""
    return len(state) == len(found) and not any(
        isinstance(held, dict | list) and type(given) is not type(held)
        for given, held in zip(state, found, strict=True)
    )


def _is_near(expected: Tensor, got: Tensor) -> bool:
    if expected.shape != got.shape or torch.equal(expected, got):
        return expected.shape == got.shape
    return is_differentiable(got) and torch.allclose(
        expected, got, rtol=1e-3, atol=1e-5, equal_nan=True
    )
