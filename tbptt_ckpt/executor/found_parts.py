"""Whether the steps of a module are run by their parts, found before the first run.

NOTE [What a trace does not see]
Found parts are what the module did once. Numbers and texts in its attributes are compared before
every window, and now and then a step is run by the module itself: what is different is found
anew. Parts that were said are the module.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tbptt_ckpt.data.blocks import Column, StepBlock, narrow_blocks
from tbptt_ckpt.data.packing import join_blocks
from tbptt_ckpt.executor.fingerprint import step_difference
from tbptt_ckpt.executor.segment_parts import SegmentParts, have_lanes
from tbptt_ckpt.module.ambient import untouched
from tbptt_ckpt.module.attributes import plain_attributes
from tbptt_ckpt.module.held_parts import hold_against
from tbptt_ckpt.module.hooks import SilenceableHooks, silent_hooks
from tbptt_ckpt.module.inside import unwrapped
from tbptt_ckpt.module.outputs import OutputsNeeded
from tbptt_ckpt.module.recurrence import Recurrence, split_result
from tbptt_ckpt.module.recurrent import Recurrent, as_step
from tbptt_ckpt.module.step_effects import NoPartsError
from tbptt_ckpt.module.step_parts import StepParts, bare_cell
from tbptt_ckpt.module.traced_parts import traced_parts
from tbptt_ckpt.module.trees import Tree, map_tensors, tensors_of
from tbptt_ckpt.time_batching.policy import TimeBatching

_LANES = 3  # that are looked at
_WATCHED = 200  # steps of windows for one that the module runs itself
_MOST_CHANGES = 8  # of a module whose parts are found anew


class FoundParts:
    """The parts of a module's steps, as soon as a step has been seen."""

    def __init__(
        self, recurrence: Recurrence, time_batching: TimeBatching, *, in_half: bool
    ) -> None:
        self._recurrence, self._batching, self._in_half = recurrence, time_batching, in_half
        self._is_settled = not recurrence.per_step
        self._parts: SegmentParts | None = None
        self._attributes: object = None  # of the module, where its parts were found by a trace
        self._unwatched_steps = self._num_changes = 0

    def may_be_taken(self) -> bool:
        """Whether steps are run by their parts, or may be, where none has been seen yet."""
        return self._batching.takes_parts() and not (self._is_settled and self._parts is None)

    def of(self, blocks: Sequence[StepBlock], state: Tree) -> tuple[SegmentParts, StepBlock] | None:
        """What runs these steps, and they as one block with time first; None if nothing does."""
        if self._parts is None or not self._batching.takes_parts() or not _are_rows(blocks):
            return None
        block = join_blocks(blocks).with_time_first()
        return (self._parts, block) if have_lanes(block.inputs, state) else None

    def waits_for_state(self, state: Tree) -> bool:
        """Whether a first step has to make the state from which steps are run by their parts."""
        return self._parts is not None and self._batching.takes_parts() and not tensors_of(state)

    def watch(self, blocks: Sequence[StepBlock], begin: int, stop: int, state: Tree) -> None:
        """A window begins: find the parts, or hold those of a trace against what is there now."""
        if not self._batching.takes_parts():
            return
        if self._parts is not None and self._attributes is not None:
            self._hold(blocks, begin, stop, state)
        if not self._is_settled:
            self._look(blocks, begin, state)

    def _hold(self, blocks: Sequence[StepBlock], begin: int, stop: int, state: Tree) -> None:
        self._unwatched_steps += stop - begin
        module = self._recurrence.module
        is_same = plain_attributes(module) == self._attributes  # type: ignore[arg-type]
        if is_same and (self._unwatched_steps < _WATCHED or self._agree(blocks, begin, state)):
            return
        self._num_changes += 1
        self._parts, self._is_settled = None, self._num_changes > _MOST_CHANGES
        if self._is_settled:
            self._batching.leave("step in parts", "it is another one from window to window")

    def _look(self, blocks: Sequence[StepBlock], begin: int, state: Tree) -> None:
        """Find them from one step, if its inputs and state have the same lanes."""
        inputs = _one_step(blocks, begin)
        if inputs is None:
            return
        try:
            with torch.inference_mode(False), torch.enable_grad():
                self._look_at(inputs, state)
        except NoPartsError as error:
            self._is_settled = True
            self._batching.leave("step in parts", str(error))

    def _look_at(self, inputs: Tree, state: Tree) -> None:
        one = map_tensors(lambda t: t[0], inputs)
        if not tensors_of(state):  # the module makes it
            with untouched(self._recurrence.module, tensors=tensors_of(one)), torch.no_grad():
                state = split_result(self._recurrence.call(one, state), self._recurrence)[1]
        if not have_lanes(inputs, state):
            return
        try:  # what is looked at takes memory, beside what a budget was promised for
            self._parts = self._found(*map_tensors(lambda t: t[:_LANES], (one, state)))
        except NoPartsError:
            if tensors_of(state)[0].shape[0] <= _LANES:
                raise
            self._parts = self._found(one, state)  # perhaps so many lanes must be
        self._is_settled = True

    def _agree(self, blocks: Sequence[StepBlock], begin: int, state: Tree) -> bool:
        """Whether the module itself gives for one step what its parts give."""
        inputs = _one_step(blocks, begin)
        if self._parts is None or inputs is None or not have_lanes(inputs, state):
            return True
        self._unwatched_steps = 0
        with torch.no_grad(), SilenceableHooks(), silent_hooks(), OutputsNeeded(True):
            one = map_tensors(lambda t: t[0], inputs)
            own = split_result(self._recurrence.call(one, state), self._recurrence)
            outputs, last = self._parts.run(inputs, state, 0, _rows)
        mine = map_tensors(lambda t: t[0], outputs), last
        return step_difference(own, mine, in_half=False)[1]

    def _found(self, inputs: Tree, state: Tree) -> SegmentParts:
        module = self._recurrence.module
        parts = _said_by(unwrapped(module))
        if parts is None:
            if self._in_half or torch.is_autocast_enabled("cpu"):
                raise NoPartsError(
                    "autocast, whose rounding hides what differs; say parts with Recurrent"
                )
            if any(not t.is_cpu for t in tensors_of((inputs, state))):
                raise NoPartsError("parts are looked for on the CPU only; say them with Recurrent")
            parts = traced_parts(module, inputs, state)  # type: ignore[arg-type]
            self._attributes = plain_attributes(module)  # type: ignore[arg-type]
        hold_against(parts, module, inputs, state)  # type: ignore[arg-type]
        return SegmentParts(parts)


def _one_step(blocks: Sequence[StepBlock], begin: int) -> Tree | None:
    """The inputs of a step, with time first; None where inputs are no tensors of steps."""
    (block,) = narrow_blocks(blocks, begin, begin + 1)
    return block.with_time_first().inputs if _are_rows([block]) else None


def _are_rows(blocks: Sequence[StepBlock]) -> bool:
    return not any(isinstance(block.inputs, Column) for block in blocks)


def _said_by(module: object) -> StepParts | None:
    """The parts of a module that are known without looking."""
    if isinstance(module, Recurrent):
        return module.parts()
    cell = bare_cell(module)
    return None if cell is None else StepParts(_same, as_step(cell.cell), _features, cell)


def _same(inputs: Tree) -> Tree:
    return inputs


def _features(features: Tree, _encoded: Tree) -> Tree:
    return features


def _rows(whole: Tree) -> list[Tree]:
    return [map_tensors(lambda t: t[0], whole)]
