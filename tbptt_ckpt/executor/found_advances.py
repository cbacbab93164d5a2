"""Advances of a segment module that make its state alone: what is for the outputs is left out.

The state of a call whose code is plain is made by the operations of a trace that it hangs on, in
the order and on the tensors of the call itself, so that its bits are the same. As parts of a step,
what was found holds for one pass over a window, once a look at the module has found it as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tbptt_ckpt.data.blocks import Column, StepBlock, narrow_blocks, to_time_dim
from tbptt_ckpt.data.packing import join_blocks
from tbptt_ckpt.module.ambient import untouched
from tbptt_ckpt.module.attributes import Attributes, look_of, plain_attributes
from tbptt_ckpt.module.looked_through import looked_through, template_of
from tbptt_ckpt.module.outputs import OutputsNeeded
from tbptt_ckpt.module.part_functions import part_of
from tbptt_ckpt.module.plain_code import check_plain
from tbptt_ckpt.module.recurrence import Recurrence, split_result
from tbptt_ckpt.module.recurrent import Recurrent
from tbptt_ckpt.module.step_effects import NoPartsError
from tbptt_ckpt.module.trees import (
    Tree,
    copy_containers,
    iterate_leaves,
    map_tensors,
    replace_tensors,
    structure,
    tensors_of,
)
from tbptt_ckpt.time_batching.interception import has_function_mode
from tbptt_ckpt.time_batching.policy import TimeBatching

Advance = Callable[[Any, Tree], tuple[None, Tree]]  # as the module, without its outputs

_NAME = "state alone in advances"
_SIZES = ((2, 3), (4, 5))  # steps and lanes that are looked at
_MOST_HELD = 8  # attributes with which a module is looked through


@dataclass(frozen=True, slots=True)
class _Held:
    """What makes the state of a module as it looked; None where nothing does."""

    looks: object
    used: Attributes | None  # what a trace has read once
    advances: dict[bool, Advance] | None  # from a state, and from None


class FoundAdvances:
    """What makes the state of a segment module alone, where plain code shows what does.

    `traces`: whether a trace may be made.
    """

    def __init__(self, recurrence: Recurrence, batching: TimeBatching, *, traces: bool) -> None:
        self._recurrence, self._batching = recurrence, batching
        call = recurrence.call  # who wraps or binds a module wants to be called
        self._is_open = (
            traces
            and bool(batching.choice)
            and not recurrence.per_step
            and recurrence.layer is None
            and call is recurrence.module
            and isinstance(call, nn.Module)
            and not isinstance(call, Recurrent)  # which leaves its readout out by itself
        )
        self._held: list[_Held] = []
        self._num_held = 0
        self._in_force: dict[bool, Advance] | None = None

    def lapse(self) -> None:
        """A pass begins: what was found is not of the module until a look."""
        self._in_force = None

    def of(self, state: Tree) -> Advance | None:
        """What makes the state that a call reaches from this one; None if the module does."""
        return None if self._in_force is None else self._in_force[bool(tensors_of(state))]

    def look(self, blocks: Sequence[StepBlock], begin: int, state: Tree) -> bool | None:
        """A window begins: find what makes the state, if it is not known of the module as it is.

        Returns:
            Whether advances make it alone; None where that is never so.
        """
        self._in_force = None
        module = self._recurrence.module
        if not self._is_open or not isinstance(module, nn.Module):
            return None
        if is_watched(blocks, state) or any(isinstance(each.inputs, Column) for each in blocks):
            return False
        looks = self._looks(module, blocks[0], state)
        held = next((each for each in self._held if each.looks == looks), None)
        if held is not None and held.used is not None and held.used.changed(but_weights=True):
            self._held.remove(held)
            held = None
        if held is None:
            held = self._found(module, looks, blocks, begin, state)
        self._in_force = held.advances
        return self._in_force is not None

    def _looks(self, module: nn.Module, block: StepBlock, state: Tree) -> object:
        """All that a trace takes for given; steps and lanes may be any."""
        recurrence = self._recurrence
        kinds = [
            [
                (t.dtype, [n for d, n in enumerate(t.shape) if d not in free])
                for t in tensors_of(tree)
            ]
            for tree, free in (
                (to_time_dim(block.inputs, block.time_dim, 0), (0, 1)),
                (state, (recurrence.lane_dim,)),
            )
        ]
        nested = structure(block.inputs), structure(state)
        return plain_attributes(module), look_of(module), kinds, nested

    def _found(
        self,
        module: nn.Module,
        looks: object,
        blocks: Sequence[StepBlock],
        begin: int,
        state: Tree,
    ) -> _Held:
        advances = used = None
        try:
            self._check_number()
            check_plain(module)
            inputs = self._inputs(blocks, begin)
            begun = tensors_of(state)
            advances = {False: self._advance(module, inputs, state)} if not begun else {}
            reached = state if begun else self._call(module, self._few(inputs, None, 0))[1]
            advances[True] = self._advance(module, inputs, reached)
            used = Attributes(module)
        except NoPartsError as error:
            advances = None
            self._batching.leave(_NAME, str(error))
        held = _Held(looks, used, advances)
        self._held = [*self._held[-1:], held]  # modes come and go
        self._num_held += 1
        return held

    def _check_number(self) -> None:
        if self._num_held == _MOST_HELD:
            raise NoPartsError("its attributes, or what it is given, keep changing")

    def _inputs(self, blocks: Sequence[StepBlock], begin: int) -> Tree:
        last = min(blocks[-1].stop, begin + max(steps for steps, _ in _SIZES))
        block = join_blocks(list(narrow_blocks(blocks, begin, last)))
        return to_time_dim(block.inputs, block.time_dim, self._recurrence.time_dim)

    def _few(self, inputs: Tree, state: Tree, which: int) -> tuple[Tree, Tree]:
        """So many steps and lanes of these, over and over where there are fewer."""
        steps, lanes = _SIZES[which]
        time_dim, lane_dim = self._recurrence.time_dim, self._recurrence.lane_dim
        few = partial(_repeated, sizes={time_dim: steps, 1 - time_dim: lanes})
        return map_tensors(few, inputs), map_tensors(
            partial(_repeated, sizes={lane_dim: lanes}), state
        )

    def _advance(self, module: nn.Module, inputs: Tree, state: Tree) -> Advance:
        """What makes the state, held against the module itself."""
        examples = [self._few(inputs, state, which) for which in range(len(_SIZES))]
        try:
            trace = looked_through(module, *examples[0], examples[1])
        except NoPartsError:
            raise
        except Exception as error:  # whatever a module of the user's may do
            raise NoPartsError(f"it cannot be looked through: {error!r}") from error
        made = [n for n in iterate_leaves(trace.new_state) if n is not None]
        advance = _Advance(
            part_of(trace.graph, [*trace.inputs, *trace.state], made),
            SimpleNamespace(step=module),
            template_of(trace.new_state),
        )
        for example in examples:
            _, expected = self._call(module, example)
            with untouched(module, tensors=tensors_of(example)), torch.no_grad():
                _, found = advance(*example)
            if structure(found) != structure(expected) or not all(
                torch.equal(one, other)
                for one, other in zip(tensors_of(found), tensors_of(expected), strict=True)
            ):
                raise NoPartsError("what was found does not make the state of the module itself")
        return advance

    def _call(self, module: nn.Module, example: tuple[Tree, Tree]) -> Any:
        inputs, state = example
        with (
            untouched(module, tensors=tensors_of(example)),
            torch.no_grad(),
            OutputsNeeded(True),
        ):
            try:
                return split_result(module(inputs, copy_containers(state)), self._recurrence)
            except Exception as error:
                raise NoPartsError(f"a few of its steps and lanes fail: {error!r}") from error


@dataclass(frozen=True, slots=True)
class _Advance:
    function: Callable[..., tuple[Tensor, ...]]
    step: SimpleNamespace
    template: Tree

    def __call__(self, inputs: Any, state: Tree) -> tuple[None, Tree]:
        values = self.function(self.step, *tensors_of(inputs), *tensors_of(state))
        return None, replace_tensors(self.template, list(values))


def _repeated(tensor: Tensor, sizes: dict[int, int]) -> Tensor:
    for dim, size in sizes.items():
        if dim >= tensor.dim():
            raise NoPartsError("inputs and state do not have time and lanes where they are said")
        index = torch.arange(size, device=tensor.device) % tensor.shape[dim]
        tensor = tensor.detach().index_select(dim, index)
    return tensor


def is_watched(blocks: Sequence[StepBlock], state: Tree) -> bool:
    """Whether somebody wants to see each operation, or it runs elsewhere than on the CPU."""
    modes = torch._C._len_torch_dispatch_stack() or torch.is_inference_mode_enabled()
    hooks = nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]
    on_cpu = all(tensor.is_cpu for tensor in tensors_of((blocks[0].inputs, state)))
    others = hooks or has_function_mode() or torch.is_autocast_enabled("cpu")
    return bool(modes or others or not on_cpu)
