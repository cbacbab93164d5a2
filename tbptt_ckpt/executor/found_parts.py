"""Whether the steps of a module are run by its parts, which a first step decides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from tbptt_ckpt.data.blocks import Column, StepBlock, narrow_blocks
from tbptt_ckpt.data.packing import join_blocks
from tbptt_ckpt.executor.segment_parts import SegmentParts, have_lanes
from tbptt_ckpt.module.ambient import untouched
from tbptt_ckpt.module.attributes import plain_attributes
from tbptt_ckpt.module.first_call import call_first
from tbptt_ckpt.module.held_parts import hold_against
from tbptt_ckpt.module.recurrence import Recurrence, split_result
from tbptt_ckpt.module.recurrent import Recurrent, as_step, module_of
from tbptt_ckpt.module.step_effects import NoPartsError
from tbptt_ckpt.module.step_parts import StepParts, bare_cell, has_hooks
from tbptt_ckpt.module.trees import Tree, copy_containers, map_tensors, tensors_of
from tbptt_ckpt.time_batching.policy import TimeBatching

_LANES = 3  # that are looked at


class FoundParts:
    """The parts of a module's steps, once a step has shown that they are those of the module."""

    def __init__(self, recurrence: Recurrence, batching: TimeBatching) -> None:
        self._recurrence, self._batching = recurrence, batching
        # What is given itself: who wraps, compiles or binds a module wants to be called.
        self._said = _said_by(module_of(recurrence.call)) if recurrence.per_step else None
        self._parts: SegmentParts | None = None
        self._attributes: object = None  # of the module, as it was held

    def may_be_taken(self) -> bool:
        """Whether steps are run by their parts, or may be, where none has been seen yet."""
        return self._said is not None and self._batching.takes_parts()

    def of(self, blocks: Sequence[StepBlock], state: Tree) -> tuple[SegmentParts, StepBlock] | None:
        """What runs these steps, and they as one block with time first; None if nothing does."""
        if self._parts is None or not self._batching.takes_parts() or not _are_rows(blocks):
            return None
        block = join_blocks(blocks).with_time_first()
        return (self._parts, block) if have_lanes(block.inputs, state) else None

    def are_one_call(self) -> bool:
        """Whether what a run's backward adds to its graph does not grow with its steps."""
        parts = self._parts if self._batching.takes_parts() else None
        return parts is not None and parts.has_fused

    def look(self, blocks: Sequence[StepBlock], begin: int, state: Tree) -> None:
        """A window begins: hold the parts against the module, if they are not known of it as it is.

        Not later, where a checkpoint may be recording what is run.
        """
        module = self._recurrence.module
        if self._said is None or not isinstance(module, nn.Module):
            return
        (block,) = narrow_blocks(blocks, begin, begin + 1)
        if not self._batching.takes_parts():
            self._batching.leave_slower("step in parts")
            return
        if not _are_rows([block]):
            return
        attributes = plain_attributes(module)  # modes and hooks are among them
        if self._parts is not None and attributes == self._attributes:
            return
        self._parts, self._attributes = None, attributes
        inputs = block.with_time_first().inputs
        one = map_tensors(lambda t: t[0], inputs)
        with untouched(module, tensors=tensors_of((one, state))), torch.no_grad():
            result = call_first(self._recurrence, one, copy_containers(state))
            reached = split_result(result, self._recurrence)[1]
        try:
            state = state if tensors_of(state) else reached  # which the module makes
            self._hold(self._said, module, inputs, state)
        except NoPartsError as error:
            self._batching.leave("step in parts", str(error))
            self._said = None

    def _hold(self, said: StepParts, module: nn.Module, inputs: Tree, state: Tree) -> None:
        if any(map(has_hooks, module.modules())):
            raise NoPartsError("it has hooks, which want to see every step")
        if not tensors_of(state) or not have_lanes(inputs, state):
            raise NoPartsError("inputs and state do not have the same lanes on dimension 0")
        # A few lanes, since there may be little room.
        few = map_tensors(lambda t: t[:_LANES], (map_tensors(lambda t: t[0], inputs), state))
        hold_against(said, module, *few)
        self._parts = SegmentParts(said, self._batching)


def _are_rows(blocks: Sequence[StepBlock]) -> bool:
    return not any(isinstance(block.inputs, Column) for block in blocks)


def _said_by(module: object) -> StepParts | None:
    """The parts of a module that says them, or is a cell with a kernel for segments."""
    if isinstance(module, Recurrent) and type(module).forward is Recurrent.forward:
        return module.parts()
    cell = bare_cell(module)
    return None if cell is None else StepParts(_same, as_step(cell.cell), _features, cell)


def _same(inputs: Tree) -> Tree:
    return inputs


def _features(features: Tree, _encoded: Tree) -> Tree:
    return features
