"""Whether the steps of a module are run by their parts, which a first step decides.

Parts that a module says are held against it once. Those that a trace has found know numbers in
attributes and globals as they were: they are in force for one pass over a window, once a look at
the module has found them to be those of today.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tbptt_ckpt.data.blocks import Column, StepBlock, narrow_blocks
from tbptt_ckpt.data.packing import join_blocks
from tbptt_ckpt.errors import TbpttWarning
from tbptt_ckpt.executor.found_advances import FoundAdvances, is_watched
from tbptt_ckpt.executor.segment_parts import SegmentParts, have_lanes
from tbptt_ckpt.memory.storages import tensor_bytes
from tbptt_ckpt.module.ambient import untouched
from tbptt_ckpt.module.attributes import Attributes, look_of, plain_attributes
from tbptt_ckpt.module.first_call import call_first
from tbptt_ckpt.module.held_parts import Precision, hold_against, hold_step
from tbptt_ckpt.module.inside import name_of
from tbptt_ckpt.module.plain_code import check_plain
from tbptt_ckpt.module.recurrence import Recurrence, split_result
from tbptt_ckpt.module.recurrent import Recurrent, module_of
from tbptt_ckpt.module.step_effects import NoPartsError
from tbptt_ckpt.module.step_parts import CELLS, StepParts, bare_cell, has_hooks
from tbptt_ckpt.module.traced_parts import traced_parts
from tbptt_ckpt.module.trees import Tree, copy_containers, map_tensors, tensors_of
from tbptt_ckpt.time_batching.policy import TimeBatching

_LANES = 3  # that are looked at
_OF_CELL = (1, 2)  # tensors that the state of one of torch's cells has
_LEAST_STEPS = 32  # of a window, below which looking takes longer than it spares
_NOTHING = nn.Module()  # whose state is looked at alone
_CHECKED_STEPS = 200  # one step in so many is run by the module as well, if parts were traced
_COPIED_BYTES = 1 << 26  # of a module that is compared in float64, on a copy
_MOST_HELD = 8  # attributes with which a module is looked through


@dataclass(frozen=True, slots=True)
class _Held:
    """Parts that were held against a module as it looked; None where it has none."""

    looks: object
    parts: SegmentParts | None
    state: object = None  # how that looked; None where there was none
    used: Attributes | None = None  # what a trace has read once


class FoundParts:
    """The parts of a module's steps, once a step has shown that they are those of the module.

    `traces`: whether parts that a module does not say may be found by a trace. `has_room`: whether
    that may take a copy of the module, and its gradients, at any window.
    """

    def __init__(
        self, recurrence: Recurrence, batching: TimeBatching, *, traces: bool, has_room: bool
    ) -> None:
        self._recurrence, self._batching, self._has_room = recurrence, batching, has_room
        # What is given itself: who wraps, compiles or binds a module wants to be called.
        owner = module_of(recurrence.call) if recurrence.per_step else None
        self._said = _said_by(owner)
        self._is_traced = self._said is None and traces and _may_have_parts(owner, batching)
        self._held: list[_Held] = []
        self._num_held = 0
        self._parts: SegmentParts | None = None  # that are in force
        self.advances = FoundAdvances(recurrence, batching, traces=traces)
        self._num_steps = self._num_windows = 0  # since parts were last compared
        self._is_counted = False  # the window that begins

    def may_be_taken(self) -> bool:
        """Whether steps are run by their parts, or may be, where none has been seen yet."""
        has_some = not self._held or any(each.parts is not None for each in self._held)
        is_open = self._said is not None or self._is_traced
        return is_open and has_some and self._batching.takes_parts()

    def of(self, blocks: Sequence[StepBlock], state: Tree) -> tuple[SegmentParts, StepBlock] | None:
        """What runs these steps, and they as one block with time first; None if nothing does."""
        if self._parts is None or not self._batching.takes_parts() or not _are_rows(blocks):
            return None
        if self._is_traced and not tensors_of(state):  # which the module makes
            return None
        block = join_blocks(blocks).with_time_first()
        return (self._parts, block) if have_lanes(block.inputs, state) else None

    def are_one_call(self) -> bool:
        """Whether what a run's backward adds to its graph does not grow with its steps."""
        parts = self._parts if self._batching.takes_parts() else None
        return parts is not None and parts.is_one_call

    @property
    def are_in_force(self) -> bool:
        """Whether steps run by their parts, as the last look has shown."""
        return self._parts is not None

    @property
    def have_cell(self) -> bool:
        """Whether those in force have a cell of torch's, which may run all steps at once."""
        return self._parts is not None and self._parts.has_cell

    @property
    def of_kernel(self) -> Tensor | None:
        """The recurrent weight of a cell in force that has a kernel for all steps."""
        return None if self._parts is None else self._parts.of_kernel

    def lapse(self) -> None:
        """A pass begins: parts that were traced are not those of the module until a look."""
        self.advances.lapse()
        if self._is_traced:
            self._parts = None

    def look(
        self, blocks: Sequence[StepBlock], begin: int, state: Tree, *, ahead: bool = False
    ) -> bool | None:
        """A window begins: hold the parts against the module, if they are not known of it as it is.

        Not later, where a checkpoint may be recording what is run. `ahead`: before it is planned,
        so that it will be looked at once more.

        Returns:
            Whether its steps run by their parts, or advances of a segment module make its state
            alone; None where their form does not ask.
        """
        if not self._recurrence.per_step:
            return self.advances.look(blocks, begin, state, ahead=ahead)
        self._is_counted &= not ahead
        self._look(blocks, begin, state)
        self._is_counted = ahead
        return self._parts is not None if self._batching.takes_parts() else None

    def _look(self, blocks: Sequence[StepBlock], begin: int, state: Tree) -> None:
        module, leaves = self._recurrence.module, tensors_of(state)
        if leaves and len(leaves) not in _OF_CELL:
            self._is_traced = False
        if not (self._said or self._is_traced) or not isinstance(module, nn.Module):
            return
        if not self._batching.takes_parts():
            self._batching.leave_slower("step in parts")
            return
        (block,) = narrow_blocks(blocks, begin, begin + 1)
        is_long = bool(self._held) or blocks[-1].stop - blocks[0].start >= _LEAST_STEPS
        if not _are_rows([block]) or (
            self._is_traced and (not is_long or is_watched(blocks, state))
        ):
            return
        if not self._is_counted:
            self._num_steps += blocks[-1].stop - begin
            self._num_windows += 1
        inputs, looks = block.with_time_first().inputs, [plain_attributes(module)]
        if self._is_traced:
            looks.append(look_of(module, map_tensors(lambda t: t[0], inputs)))
        now = look_of(_NOTHING, state) if leaves and self._is_traced else None
        held = next((each for each in self._held if each.looks == looks), None)
        if held is not None and None not in (held.state, now) and held.state != now:
            held = None
        if held is not None and not self._is_still(held, module, inputs, state):
            self._held.remove(held)
            held = None
        if held is None:
            held = self._hold(module, looks, inputs, state)
        self._parts = held.parts

    def _hold(self, module: nn.Module, looks: object, inputs: Tree, state: Tree) -> _Held:
        if self._is_traced and self._num_held == _MOST_HELD:
            self._batching.leave(
                "step in parts", "its attributes, or what it is given, keep changing"
            )
            return _Held(looks, None)
        parts = used = now = None
        try:  # before anything is called that leaves more than its results
            _check_unwatched(module)
            if self._is_traced:
                check_plain(module)
            state = self._reached(module, inputs, state)
            now = look_of(_NOTHING, state) if self._is_traced else None
            parts = SegmentParts(self._compared(module, inputs, state), self._batching)
            used = Attributes(module) if self._is_traced else None
        except NoPartsError as error:
            self._batching.leave("step in parts", str(error))
        held = _Held(looks, parts, now, used)
        self._held = [*self._held[-1:], held]  # modes come and go
        self._num_held += 1
        self._num_steps = self._num_windows = 0
        return held

    def _reached(self, module: nn.Module, inputs: Tree, state: Tree) -> Tree:
        """The state, or that which the module makes where there is none, after a first call."""
        one = map_tensors(lambda t: t[0], inputs)
        with untouched(module, tensors=tensors_of((one, state))), torch.no_grad():
            result = call_first(self._recurrence, one, copy_containers(state))
            reached = split_result(result, self._recurrence)[1]
        return state if tensors_of(state) else reached

    def _compared(self, module: nn.Module, inputs: Tree, state: Tree) -> StepParts:
        if not tensors_of(state) or not have_lanes(inputs, state):
            raise NoPartsError("inputs and state do not have the same lanes on dimension 0")
        # A few lanes, since there may be little room.
        few = map_tensors(lambda t: t[:_LANES], (map_tensors(lambda t: t[0], inputs), state))
        parts = self._said or traced_parts(module, *few)
        if self._said is None and parts.cell is None:  # else it is not worth it
            raise NoPartsError("its transition is more than one of torch's cells")
        # Said ones have the gradients of the module in every mode, or in none.
        grads = (self._is_traced and self._has_room) or not self._num_held
        is_copied = self._is_traced and self._has_room and tensor_bytes(module) <= _COPIED_BYTES
        hold_against(parts, module, *few, on_copy=is_copied, grads=grads)
        return parts

    def _is_still(self, held: _Held, module: nn.Module, inputs: Tree, state: Tree) -> bool:
        """Whether traced parts are those of the module, as far as one step in so many shows."""
        parts, used = held.parts, held.used
        if used is None or parts is None:
            return True
        if used.changed(but_weights=True):  # which are read at each call
            return False
        if self._num_steps < _CHECKED_STEPS:
            return True
        if not tensors_of(state) or not have_lanes(inputs, state):
            return True
        windows, self._num_steps, self._num_windows = self._num_windows, 0, 0
        one = map_tensors(lambda t: t[0], inputs)
        with untouched(module, tensors=tensors_of((one, state))), torch.no_grad():
            with (precision := Precision()):
                plain = self._recurrence.call(one, copy_containers(state))
            outputs, last = parts.run(inputs, state, 0, _only_row, None)
        mine = split_result(plain, self._recurrence)
        if hold_step(mine, (map_tensors(lambda t: t[0], outputs), last), precision):
            return True
        if windows > 1:  # else it was before any step
            warnings.warn(
                f"module={name_of(module)} is not what it was when the parts of its step were "
                f"found: something that it reads has changed within the last {windows} windows, "
                "which may have run with the old value; parts are found anew. With "
                "time_batching=False the module itself runs every step",
                TbpttWarning,
                stacklevel=2,
            )
        return False


def _check_unwatched(module: nn.Module) -> None:
    if any(map(has_hooks, module.modules())):
        raise NoPartsError("it has hooks, which want to see every step")


def _are_rows(blocks: Sequence[StepBlock]) -> bool:
    return not any(isinstance(block.inputs, Column) for block in blocks)


def _only_row(whole: Tree) -> Iterator[Any]:
    yield map_tensors(lambda t: t[0], whole)


def _may_have_parts(module: object, batching: TimeBatching) -> bool:
    """Whether a trace may find parts worth having, of which one has a kernel."""
    if not isinstance(module, nn.Module) or not batching.choice:
        return False
    return any(type(part) in CELLS for part in module.modules())


def _said_by(module: Any) -> StepParts | None:
    """The parts of a module that says them, or is a cell with a kernel for segments."""
    if isinstance(module, Recurrent) and type(module).forward is Recurrent.forward:
        return module.parts()
    return None if bare_cell(module) is None else Recurrent(module).parts()
