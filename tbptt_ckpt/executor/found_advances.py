"""Calls of a segment module that make its state alone: what is for the outputs is left out.

The state of a call whose code is plain is made by the operations of a trace that it hangs on, in
the order and on the tensors of the call itself, so that its bits are the same. As parts of a step,
what was found holds for one pass over a window, once a look at the module has found it as it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from tbptt_ckpt.data.blocks import Column, StepBlock, narrow_blocks, to_time_dim
from tbptt_ckpt.data.packing import join_blocks
from tbptt_ckpt.errors import TbpttWarning
from tbptt_ckpt.memory.reading import Told
from tbptt_ckpt.module.ambient import untouched
from tbptt_ckpt.module.attributes import Attributes, look_of, plain_attributes
from tbptt_ckpt.module.first_call import call_first
from tbptt_ckpt.module.inside import name_of
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
    iterate_tensors,
    map_tensors,
    replace_tensors,
    structure,
    tensors_of,
)
from tbptt_ckpt.time_batching.interception import has_function_mode
from tbptt_ckpt.time_batching.policy import TimeBatching

_NAME = "state alone in advances"
_SIZES = ((2, 3), (3, 5))  # steps and lanes that are looked at; no sum or product is in both
_ONE = ((1, 1),)  # a step and lane that are compared again, in less memory than any leaf
_MOST_HELD = 8  # attributes with which a module is looked through
_CHECKED_WINDOWS = 16  # in one of so many, what was found is held against the module again
_LEAST_PRODUCTS = 50_000_000  # of a window, for each module inside: a look takes 0.5 % of it


@dataclass(frozen=True, slots=True)
class _Advance:
    """What makes the state of a call."""

    function: Callable[..., tuple[Tensor, ...]]
    step: SimpleNamespace
    template: Tree
    kinds: object  # of the state that it begins from

    def __call__(self, inputs: Tree, state: Tree) -> Tree:
        values = self.function(self.step, *tensors_of(inputs), *tensors_of(state))
        return replace_tensors(self.template, list(values))


@dataclass(frozen=True, slots=True)
class _Held:
    """What makes the state of a module as it looked; nothing where the module does."""

    looks: object
    used: Attributes | None  # what a trace has read once
    advances: tuple[_Advance, ...]  # from the first state, and from others if they are otherwise


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
        self._is_worth = False  # once a window was long enough
        self._is_asked = True  # for a state alone, since the last look
        self._held: list[_Held] = []
        self._num_held = self._num_windows = 0  # the latter since it was last compared
        self._in_force: tuple[_Advance, ...] = ()

    def lapse(self) -> None:
        """A pass begins: what was found is not of the module until a look."""
        self._in_force = ()

    def run(self, inputs: Tree, state: Tree, told: Told | None) -> Tree | None:
        """The state that a call reaches from this one; None if the module has to make it."""
        self._is_asked = True
        kinds = self._kinds(state) if self._in_force else None
        for advance in self._in_force:
            if advance.kinds == kinds:
                if told is not None:
                    told(partial(iterate_tensors, state))
                return advance(inputs, state)
        return None

    def look(
        self, blocks: Sequence[StepBlock], begin: int, state: Tree, *, ahead: bool
    ) -> bool | None:
        """A window begins: find what makes the state, if it is not known of the module as it is.

        `ahead`: before it is planned. Of others, none is looked at after one without an advance.

        Returns:
            Whether advances make it alone; None where that is never so.
        """
        self._in_force, module = (), self._recurrence.module
        has_columns = any(isinstance(each.inputs, Column) for each in blocks)
        if not self._is_open or not isinstance(module, nn.Module) or has_columns:
            return None
        self._is_worth = self._is_worth or _is_large(module, blocks, begin)
        if not self._is_worth or not (ahead or self._is_asked):
            return None
        self._is_asked = ahead
        if is_watched(blocks, state):
            return False
        given = map_tensors(lambda t: t[0], blocks[0].inputs)
        looks = [plain_attributes(module), look_of(module, given), self._kinds(state)]
        held = next((each for each in self._held if each.looks == looks), None)
        if held is not None and not self._is_still(held, blocks, begin, state):
            self._held.remove(held)
            held = None
        if held is None:
            held = self._found(module, looks, blocks, begin, state)
        self._in_force = held.advances
        return bool(self._in_force)

    def _kinds(self, state: Tree) -> object:
        lanes = self._recurrence.lane_dim  # of which there may be any number
        leaves = tensors_of(state)
        shapes = [(t.dtype, t.shape[:lanes], t.shape[lanes + 1 :]) for t in leaves]
        return structure(state), shapes

    def _found(
        self,
        module: nn.Module,
        looks: object,
        blocks: Sequence[StepBlock],
        begin: int,
        state: Tree,
    ) -> _Held:
        advances, used = tuple[_Advance, ...](), None
        try:
            _check_number(self._num_held)
            check_plain(module)
            examples = self._examples(blocks, begin, state)
            reached = self._called(*examples[0])
            begins = [examples]
            if self._kinds(reached) != self._kinds(state):
                begins.append(self._examples(blocks, begin, reached))
            advances = tuple(self._advance(module, each) for each in begins)
            used = Attributes(module)
        except NoPartsError as error:
            self._batching.leave(_NAME, str(error))
        held = _Held(looks, used, advances)
        self._held = [*self._held[-3:], held]  # modes come and go, and first states
        self._num_held, self._num_windows = self._num_held + 1, 0
        return held

    def _is_still(self, held: _Held, blocks: Sequence[StepBlock], begin: int, state: Tree) -> bool:
        """Whether what was found is of the module still, as far as a call now and then shows."""
        if held.used is None:
            return True
        if held.used.changed(but_weights=True):  # which are read at each call
            return False
        self._num_windows += 1
        if self._num_windows < _CHECKED_WINDOWS:
            return True
        windows, self._num_windows = self._num_windows, 0
        (example,) = self._examples(blocks, begin, state, _ONE)
        try:
            is_same = self._is_same(held.advances[0], *example)
        except NoPartsError:  # it may want more than one of each
            return True
        if not is_same:
            warnings.warn(
                f"module={name_of(self._recurrence.module)} is not what it was when it was found "
                "what makes its state: something that it reads has changed within the last "
                f"{windows} windows, which may have run with the old value; it is found anew. "
                "With time_batching=False the module itself makes every state",
                TbpttWarning,
                stacklevel=2,
            )
        return is_same

    def _examples(
        self,
        blocks: Sequence[StepBlock],
        begin: int,
        state: Tree,
        sizes: Sequence[tuple[int, int]] = _SIZES,
    ) -> list[tuple[Tree, Tree]]:
        """Calls over few steps and lanes of a window's first, over and over where it has fewer."""
        time_dim, lane_dim = self._recurrence.time_dim, self._recurrence.lane_dim
        last = min(blocks[-1].stop, begin + max(steps for steps, _ in sizes))
        block = join_blocks(list(narrow_blocks(blocks, begin, last)))
        inputs = to_time_dim(block.inputs, block.time_dim, time_dim)
        return [
            (
                map_tensors(
                    partial(_so_many, sizes={time_dim: steps, 1 - time_dim: lanes}), inputs
                ),
                map_tensors(partial(_so_many, sizes={lane_dim: lanes}), state),
            )
            for steps, lanes in sizes
        ]

    def _advance(self, module: nn.Module, examples: list[tuple[Tree, Tree]]) -> _Advance:
        """What makes the state, held against the module itself."""
        try:
            trace = looked_through(module, *examples[0], examples[1])
        except NoPartsError:
            raise
        except Exception as error:  # whatever a module of the user's may do
            raise NoPartsError(f"it cannot be looked through: {error!r}") from error
        made = [n for n in iterate_leaves(trace.new_state) if n is not None]
        function = part_of(trace.graph, [*trace.inputs, *trace.state], made)
        kinds, template = self._kinds(examples[0][1]), template_of(trace.new_state)
        advance = _Advance(function, SimpleNamespace(step=module), template, kinds)
        if not all(self._is_same(advance, *example) for example in examples):
            raise NoPartsError("what was found does not make the state of the module itself")
        return advance

    def _is_same(self, advance: _Advance, inputs: Tree, state: Tree) -> bool:
        """Whether a state is, bit by bit, that of the module itself; others look at NaN."""
        expected = self._called(inputs, state)
        touched = untouched(self._recurrence.module, tensors=tensors_of((inputs, state)))
        with touched, torch.no_grad():
            found = advance(inputs, state)
        return structure(found) == structure(expected) and all(
            torch.equal(mine, its) or not torch.isfinite(its).all()
            for mine, its in zip(tensors_of(found), tensors_of(expected), strict=True)
        )

    def _called(self, inputs: Tree, state: Tree) -> Tree:
        """The state that the module itself makes."""
        touched = untouched(self._recurrence.module, tensors=tensors_of((inputs, state)))
        with touched, torch.no_grad(), OutputsNeeded(True):
            try:
                result = call_first(self._recurrence, inputs, copy_containers(state))
            except Exception as error:
                raise NoPartsError(f"a few of its steps and lanes fail: {error!r}") from error
            return split_result(result, self._recurrence)[1]


def _check_number(num_held: int) -> None:
    if num_held == _MOST_HELD:
        raise NoPartsError("its attributes, or what it is given, keep changing")


def _is_large(module: nn.Module, blocks: Sequence[StepBlock], begin: int) -> bool:
    """Whether a look takes so little beside a window that nobody notices it."""
    parts = list(module.modules())
    weights = sum(
        weight.numel()
        for part in parts
        if not isinstance(part, nn.Embedding)  # of which a step reads a row
        for weight in part.parameters(recurse=False)
    )
    shape = tensors_of(blocks[0].inputs)[0].shape
    lanes = shape[1 - blocks[0].time_dim] if len(shape) > 1 else 1
    return (blocks[-1].stop - begin) * lanes * weights >= _LEAST_PRODUCTS * len(parts)


def _so_many(tensor: Tensor, sizes: dict[int, int]) -> Tensor:
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
