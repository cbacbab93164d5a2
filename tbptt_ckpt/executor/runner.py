"""Runs steps of a window: the one place where the user's module is called."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch.nn.utils import parametrize

from tbptt_ckpt.data.blocks import Column, StepBlock, narrow_blocks, steps_of, to_time_dim
from tbptt_ckpt.data.packing import join_blocks
from tbptt_ckpt.data.source import check_time_exists
from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.executor.compiled_steps import BLOCK_STEPS, CompiledSteps
from tbptt_ckpt.executor.found_parts import FoundParts
from tbptt_ckpt.executor.resets import Resets
from tbptt_ckpt.executor.segment_parts import SegmentParts, rows_of
from tbptt_ckpt.executor.sinks import LossSink, Sink
from tbptt_ckpt.executor.weight_caches import autocast_of, without_cached_weights
from tbptt_ckpt.executor.weighted_steps import is_present, narrow
from tbptt_ckpt.memory.reading import Told, told_of_calls
from tbptt_ckpt.module.counters import Counters
from tbptt_ckpt.module.first_call import begins, call_first, check_agreement, is_telling
from tbptt_ckpt.module.outputs import OutputsNeeded
from tbptt_ckpt.module.recurrence import (
    Recurrence,
    check_autocast,
    check_initialised,
    check_segment_output,
    following_time_dim,
    split_result,
)
from tbptt_ckpt.module.trees import Tree, iterate_tensors, tensors_of
from tbptt_ckpt.schedule.forms import Form
from tbptt_ckpt.time_batching.compiler import CompileChoice
from tbptt_ckpt.time_batching.policy import TimeBatching, TimeBatchingChoice


class Runner:
    """Calls a module over steps.

    Args:
        recurrence: The module.
        autocast_dtype: Run under autocast with this dtype; None leaves autocast as it is.
        time_batching: Whether products are made over all steps of a run.
        parts: What runs steps by their parts.
        compiled: What runs them by compiled blocks.
    """

    def __init__(
        self,
        recurrence: Recurrence,
        autocast_dtype: torch.dtype | None,
        time_batching: TimeBatching,
        parts: FoundParts,
        compiled: CompiledSteps,
    ) -> None:
        self.recurrence, self.time_batching = recurrence, time_batching
        self.counters = Counters(recurrence.module)
        self.parts, self.compiled = parts, compiled
        # Of a segment module, what is left being called one by one; None for all at once.
        self.call_steps: int | None = None
        self._autocast_dtype = autocast_dtype
        self._is_called = self._is_known = False  # once; in a way that tells all there is to know
        self._has_compared = False
        self._told: Told | None = None  # of calls, while steps are run

    def anew(self) -> Runner:
        """The same, which looks at its first call again, and compiles nothing."""
        given = self.recurrence, self._autocast_dtype, self.time_batching, self.parts
        return Runner(*given, CompiledSteps(self.recurrence, False, self.time_batching))

    def _call(self, inputs: Any, state: Tree) -> Any:
        if self._told is not None:
            self._told(partial(iterate_tensors, state))
        tells = not self._is_known and is_telling(self.recurrence, inputs)
        if tells or not self._is_called:
            result = call_first(self.recurrence, inputs, state)
            self._is_called, self._is_known = True, tells
            return result
        if state is not None:
            return self.recurrence.call(inputs, state)
        with begins(self.recurrence, state):
            return self.recurrence.call(inputs, state)

    def _compare_first(self, sink: Sink, inputs: Tree, outputs: Tree, targets: Tree) -> None:
        """Look once at outputs and targets, where a loss takes both."""
        if targets is not None and isinstance(sink, LossSink):
            check_agreement(self.recurrence, inputs, outputs, targets)
            self._has_compared = True

    @property
    def calls_segments(self) -> bool:
        """Whether what many steps take may be that of one call, which a cut makes two of."""
        one_call = self.parts.may_be_taken() or self.compiled.are_in_force()
        return not self.recurrence.per_step or one_call

    @property
    def block_steps(self) -> int:
        """Steps that a leaf has whole numbers of, if it may; 1 where that does not matter."""
        return self.call_steps or self.compiled.block_steps

    def call_in_blocks(self) -> None:
        """Call a segment module, which is compiled for each length, over a block or one step."""
        self.call_steps = BLOCK_STEPS

    def forms(self) -> list[Form]:
        """The forms that steps may be run in, where "auto" leaves it open; the rule's first."""
        has_parts, kernel = self.parts.are_in_force, self.parts.of_kernel
        per_step = self.recurrence.per_step
        found = self.time_batching.forms(per_step, has_parts=has_parts, of_kernel=kernel)
        return ["compiled", *found] if self.compiled.is_there else found

    @property
    def promises_bits(self) -> bool:
        """Whether a step gives the same bits however many are run together."""
        batched = self.time_batching.is_chosen(per_step=True) or self.parts.may_be_taken()
        return self.recurrence.per_step and not (batched or self.compiled.may_be_taken())

    def is_in_half(self, example: Tree) -> bool:
        """Whether steps run under autocast."""
        return autocast_of(self._autocast_dtype, self.recurrence.parameters, example) is not None

    def region(self, num_steps: int, example: Tree) -> AbstractContextManager[object]:
        """While entered, one run of so many steps is under way: autocast and time batching.

        `example` are its state and inputs, for where they are.
        """
        batched: AbstractContextManager[object] = nullcontext()
        if not self.compiled.are_in_force():  # what is compiled meets torch's own functions
            batched = self.time_batching.region(num_steps, self.recurrence.per_step)
        autocast = autocast_of(self._autocast_dtype, self.recurrence.parameters, example)
        if autocast is None and not parametrize._cache_enabled:
            return batched  # most are, and a stack of managers takes as long as a small step
        with ExitStack() as stack:
            for manager in (autocast or nullcontext(), batched, without_cached_weights()):
                stack.enter_context(manager)
            return stack.pop_all()

    def run(
        self,
        blocks: Sequence[StepBlock],
        resets: Resets,
        begin: int,
        end: int,
        state: Tree,
        sink: Sink,
    ) -> Tree:
        """Run `[begin, end)` from `state`, in a region; the state at `end`.

        `blocks` may hold more steps than `[begin, end)`; the sink takes the outputs.
        """
        wanted = sink.wanted(begin, end)
        first_wanted = wanted.start if wanted else end
        run = self._run_steps if self.recurrence.per_step else self._run_segment
        self._told = told_of_calls()
        for low, high in resets.stretches(begin, end):
            parts = list(narrow_blocks(blocks, low, high))
            state = run(parts, resets.apply(low, state), first_wanted, sink)
        return state

    def _run_steps(
        self, blocks: Sequence[StepBlock], state: Tree, first_wanted: int, sink: Sink
    ) -> Tree:
        start, stop = blocks[0].start, blocks[-1].stop
        first_wanted = min(max(start, first_wanted), stop)
        found = self.parts.of(blocks, state)
        if found is not None:
            return self._run_parts(*found, state, first_wanted, sink)
        if self.compiled.are_in_force() and tensors_of(state):
            start, state = self.compiled.run(blocks, state, first_wanted, partial(self._give, sink))
            if start == stop:
                return state
            blocks = list(narrow_blocks(blocks, start, stop))
            first_wanted = max(start, first_wanted)
        if start < first_wanted:
            with OutputsNeeded(False) as outputs:
                for block in narrow_blocks(blocks, start, first_wanted):
                    for inputs in self._step_inputs(block):
                        output, state = self._call_step(inputs, state)
                # Other forms, which may run the same steps, show only what is wanted.
                is_shown = self.parts.may_be_taken() or self.compiled.may_be_taken()
                if outputs.are_whole() and not is_shown:
                    sink.passed(first_wanted, output)
        if first_wanted < stop:
            with OutputsNeeded(True):
                for block in narrow_blocks(blocks, first_wanted, stop):
                    state = self._run_steps_with_outputs(block, state, sink)
        return state

    def _run_parts(
        self, parts: SegmentParts, block: StepBlock, state: Tree, first_wanted: int, sink: Sink
    ) -> Tree:
        """The same by their parts, for a block with time first."""
        rows, first = partial(rows_of, self.time_batching), first_wanted - block.start
        with begins(self.recurrence, state):
            outputs, state = parts.run(block.inputs, state, first, rows, self._told)
        if first_wanted < block.stop:
            self._give(sink, outputs, block.part(first_wanted, block.stop))
        return state

    def _give(self, sink: Sink, outputs: Tree, block: StepBlock) -> None:
        """Outputs of consecutive steps, with time first as their block has it."""
        if not self._has_compared:
            row, target = next(steps_of(outputs, 0, 1)), next(block.step_targets())
            self._compare_first(sink, next(block.step_inputs()), row, target)
        sink.take_steps(outputs, block)
        sink.passed(block.stop, outputs, 0)

    def _run_steps_with_outputs(self, block: StepBlock, state: Tree, sink: Sink) -> Tree:
        weights = repeat(1.0) if (w := block.step_weights()) is None else w
        rows, targets = self._step_inputs(block), block.step_targets()
        steps = zip(rows, targets, weights, strict=False)
        for inputs, target, weight in steps:
            output, state = self._call_step(inputs, state)
            if is_present(weight):
                if not self._has_compared:
                    self._compare_first(sink, inputs, output, target)
                sink.take_step(output, target, weight)
        sink.passed(block.stop, output)
        return state

    def _step_inputs(self, block: StepBlock) -> Iterator[Any]:
        if isinstance(block.inputs, Column):
            return block.step_inputs()
        rows = self.time_batching.step_inputs(block.inputs, block.time_dim)
        return block.step_inputs() if rows is None else rows

    def _call_step(self, inputs: Any, state: Tree) -> Any:
        result = self._call(inputs, state)
        if type(result) is tuple and len(result) == 2:
            return result
        return split_result(result, self.recurrence)

    def _run_segment(
        self, blocks: Sequence[StepBlock], state: Tree, first_wanted: int, sink: Sink
    ) -> Tree:
        block = join_blocks(blocks)
        time_dim, wants_outputs = self._time_dim(block), first_wanted < block.stop
        inputs = self._segment_inputs(block, time_dim)
        reached = None if wants_outputs else self.parts.advances.run(inputs, state, self._told)
        if reached is not None:
            return reached
        with OutputsNeeded(wants_outputs) as needed:
            result = self._call(inputs, state)
            is_whole = needed.are_whole()
        outputs, state = split_result(result, self.recurrence)
        if is_whole:
            sink.passed(block.stop, outputs, time_dim)
        if wants_outputs:
            num_steps = block.stop - block.start
            check_segment_output(outputs, num_steps, time_dim, self.recurrence.module)
            if not self._has_compared:
                targets = to_time_dim(block.targets, block.time_dim, time_dim)
                self._compare_first(sink, inputs, outputs, targets)
            wanted = block.part(max(block.start, first_wanted), block.stop)
            outputs = narrow(outputs, wanted.start - block.start, num_steps, num_steps, time_dim)
            targets = to_time_dim(wanted.targets, wanted.time_dim, time_dim)
            sink.take_segment(outputs, targets, wanted, time_dim)
        return state

    def _segment_inputs(self, block: StepBlock, time_dim: int) -> Tree:
        if isinstance(block.inputs, Column):
            raise ArgumentError(
                "the inputs of a segment module must be tensors of one shape and dtype at every "
                "step; use per_step=True for others"
            )
        check_time_exists("inputs", tensors_of(block.inputs)[0], time_dim)
        return to_time_dim(block.inputs, block.time_dim, time_dim)

    def _time_dim(self, block: StepBlock) -> int:
        # An unbatched nn.LSTM takes [T, F] whatever batch_first says.
        layer, time_dim = self.recurrence.layer, self.recurrence.time_dim
        return time_dim if layer is None else following_time_dim(time_dim, block.inputs)


def make_runner(
    recurrence: Recurrence,
    autocast_dtype: torch.dtype | None,
    time_batching: TimeBatchingChoice = False,
    *,
    traces: bool = False,
    has_room: bool = True,
    compile: CompileChoice = False,  # noqa: A002
) -> Runner:
    """A runner for the user's module; the rest is as for `FoundParts`."""
    module = recurrence.module
    check_initialised("module", module)
    check_autocast(module, autocast_dtype)
    batching = TimeBatching(time_batching, module)
    traces = traces and autocast_dtype is None  # which no trace sees
    parts = FoundParts(recurrence, batching, traces=traces, has_room=has_room)
    compiled = CompiledSteps(recurrence, compile, batching, in_half=autocast_dtype is not None)
    return Runner(recurrence, autocast_dtype, batching, parts, compiled)
