"""Whether the steps of a module are run by its parts, which a first step decides."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tbptt_ckpt.data.blocks import Column, StepBlock, narrow_blocks
from tbptt_ckpt.data.packing import join_blocks
from tbptt_ckpt.executor.segment_parts import SegmentParts, have_lanes
from tbptt_ckpt.module.ambient import untouched
from tbptt_ckpt.module.first_call import call_first
from tbptt_ckpt.module.held_parts import hold_against
from tbptt_ckpt.module.inside import unwrapped
from tbptt_ckpt.module.recurrence import Recurrence, split_result
from tbptt_ckpt.module.recurrent import Recurrent, as_step
from tbptt_ckpt.module.step_effects import NoPartsError
from tbptt_ckpt.module.step_parts import StepParts, bare_cell
from tbptt_ckpt.module.trees import Tree, map_tensors, tensors_of
from tbptt_ckpt.time_batching.policy import TimeBatching

_LANES = 3  # that are looked at


class FoundParts:
    """The parts of a module's steps, once a step has shown that they are those of the module."""

    def __init__(self, recurrence: Recurrence, batching: TimeBatching, may_be_taken: bool) -> None:
        self._recurrence, self._batching = recurrence, batching
        is_asked = may_be_taken and recurrence.per_step
        self._said = _said_by(unwrapped(recurrence.module)) if is_asked else None
        self._parts: SegmentParts | None = None

    def may_be_taken(self) -> bool:
        """Whether steps are run by their parts, or may be, where none has been seen yet."""
        return self._said is not None and self._batching.takes_parts()

    def of(self, blocks: Sequence[StepBlock], state: Tree) -> tuple[SegmentParts, StepBlock] | None:
        """What runs these steps, and they as one block with time first; None if nothing does."""
        if self._parts is None or not self._batching.takes_parts() or not _are_rows(blocks):
            return None
        block = join_blocks(blocks).with_time_first()
        return (self._parts, block) if have_lanes(block.inputs, state) else None

    def waits_for_state(self, state: Tree) -> bool:
        """Whether a first step has to make the state from which steps are run by their parts."""
        return self._parts is not None and self._batching.takes_parts() and not tensors_of(state)

    def are_one_call(self) -> bool:
        """Whether what a run's backward adds to its graph does not grow with its steps."""
        parts = self._parts if self._batching.takes_parts() else None
        return parts is not None and parts.has_fused

    def look(self, blocks: Sequence[StepBlock], begin: int, state: Tree) -> None:
        """A window begins: hold the parts against the module, unless that has been done.

        Not later, where a checkpoint may be recording what is run.
        """
        if self._said is None or self._parts is not None or not self._batching.takes_parts():
            return
        (block,) = narrow_blocks(blocks, begin, begin + 1)
        if not _are_rows([block]):
            return
        inputs = block.with_time_first().inputs
        one = map_tensors(lambda t: t[0], inputs)
        if not tensors_of(state):  # the module makes it
            with untouched(self._recurrence.module, tensors=tensors_of(one)), torch.no_grad():
                state = split_result(call_first(self._recurrence, one, state), self._recurrence)[1]
        if have_lanes(inputs, state):
            self._hold(self._said, one, state)

    def _hold(self, said: StepParts, inputs: Tree, state: Tree) -> None:
        few = map_tensors(lambda t: t[:_LANES], (inputs, state))  # a budget may leave little room
        try:
            hold_against(said, self._recurrence.module, *few)  # type: ignore[arg-type]
            self._parts = SegmentParts(said, self._batching)
        except NoPartsError as error:
            self._batching.leave("step in parts", str(error))
            self._said = None


def _are_rows(blocks: Sequence[StepBlock]) -> bool:
    return not any(isinstance(block.inputs, Column) for block in blocks)


def _said_by(module: object) -> StepParts | None:
    """The parts of a module that says them, or is a cell with a kernel for segments."""
    if isinstance(module, Recurrent):
        return module.parts()
    cell = bare_cell(module)
    return None if cell is None else StepParts(_same, as_step(cell.cell), _features, cell)


def _same(inputs: Tree) -> Tree:
    return inputs


def _features(features: Tree, _encoded: Tree) -> Tree:
    return features
