"""Runs steps of a window: the one place where the user's module is called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from tbptt_ckpt.data.blocks import Column, StepBlock, to_time_dim
from tbptt_ckpt.data.packing import join_blocks
from tbptt_ckpt.data.source import check_time_dim, check_time_exists
from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.executor.losses import is_present
from tbptt_ckpt.executor.sinks import Sink
from tbptt_ckpt.executor.task import WindowTask
from tbptt_ckpt.module.outputs import OutputsNeeded
from tbptt_ckpt.module.recurrence import (
    Recurrence,
    check_autocast,
    check_initialised,
    check_segment_output,
    parameters_of,
    recognise,
    split_result,
)
from tbptt_ckpt.module.trees import (
    Tree,
    is_differentiable,
    iterate_tensors,
    map_tensors,
    replace_tensors,
    structure,
    tensors_of,
)
from tbptt_ckpt.time_batching.policy import TimeBatching

_NOTHING = nullcontext()


class Runner:
    """Calls a module over steps.

    Args:
        recurrence: The module.
        autocast_dtype: Run under autocast with this dtype; None leaves autocast as it is.

    Attributes:
        time_batching: Whether products are made over all steps of a run; may be changed
            between windows.
    """

    def __init__(self, recurrence: Recurrence, autocast_dtype: torch.dtype | None = None) -> None:
        self.recurrence = recurrence
        self.time_batching = TimeBatching(False)
        self._autocast_dtype = autocast_dtype
        self._weights = parameters_of(recurrence.module)

    def run(
        self,
        task: WindowTask,
        start: int,
        stop: int,
        state: Tree,
        sink: Sink,
        longest: int | None = None,
    ) -> Tree:
        """Run `[start, stop)` from `state` and return the state at `stop`.

        Args:
            task: The window.
            start: First step.
            stop: End.
            state: The state at `start`.
            sink: Takes the outputs.
            longest: Most steps of a segment module's call; None sets no bound.
        """
        run_piece = self._run_steps if self.recurrence.per_step else self._run_segment
        per_step = self.recurrence.per_step
        with self._autocast(task, state), self.time_batching.region(stop - start, per_step):
            for begin, end in task.pieces(start, stop, longest):
                if begin != start:
                    state = rejoin(task, begin, state)
                task.enter(begin)
                task.ambient.about_to_run()
                task.executed_steps += end - begin
                state = run_piece(task, begin, end, state, sink)
                sink.close(begin, end)
                task.arrive(end, state)
        return state

    def _run_steps(self, task: WindowTask, begin: int, end: int, state: Tree, sink: Sink) -> Tree:
        wanted = sink.wanted(begin, end)
        quiet_until = wanted.start if wanted else end
        with OutputsNeeded(False):
            for low, high in task.resets.stretches(begin, quiet_until):
                state = task.resets.apply(low, state)
                for block in task.steps(low, high):
                    for inputs in self._step_inputs(block):
                        _, state = self._call_step(inputs, state)
        with OutputsNeeded(True):
            for low, high in task.resets.stretches(quiet_until, end):
                state = task.resets.apply(low, state)
                for block in task.steps(low, high):
                    state = self._run_steps_with_outputs(block, state, sink)
        return state

    def _run_steps_with_outputs(self, block: StepBlock, state: Tree, sink: Sink) -> Tree:
        weights = block.step_weights()
        steps = zip(
            self._step_inputs(block),
            block.step_targets(),
            repeat(1.0) if weights is None else weights,
            strict=False,
        )
        for inputs, target, weight in steps:
            output, state = self._call_step(inputs, state)
            if is_present(weight):
                sink.take_step(output, target, weight)
        return state

    def _step_inputs(self, block: StepBlock) -> Iterator[Any]:
        if isinstance(block.inputs, Column):
            return block.step_inputs()
        rows = self.time_batching.step_inputs(block.inputs, block.time_dim)
        return block.step_inputs() if rows is None else rows

    def _call_step(self, inputs: Any, state: Tree) -> Any:
        result = self.recurrence.call(inputs, state)
        if type(result) is tuple and len(result) == 2:
            return result
        return split_result(result, self.recurrence)

    def _run_segment(self, task: WindowTask, begin: int, end: int, state: Tree, sink: Sink) -> Tree:
        wanted = sink.wanted(begin, end)
        first_wanted = wanted.start if wanted else end
        for low, high in task.resets.stretches(begin, end):
            block = join_blocks(list(task.steps(low, high)))
            state = task.resets.apply(low, state)
            inputs, wants_outputs = self._segment_inputs(block), first_wanted < high
            with OutputsNeeded(wants_outputs):
                result = self.recurrence.call(inputs, state)
            outputs, state = split_result(result, self.recurrence)
            if wants_outputs:
                check_segment_output(
                    outputs, high - low, self._time_dim(block), self.recurrence.module
                )
                block = block.part(max(low, first_wanted), high)
                self._give_segment(block, outputs, high - low, sink)
        return state

    def _segment_inputs(self, block: StepBlock) -> Tree:
        if isinstance(block.inputs, Column):
            raise ArgumentError(
                "the inputs of a segment module must be tensors of one shape and dtype at every "
                "step; use per_step=True for others"
            )
        time_dim = self._time_dim(block)
        check_time_exists("inputs", tensors_of(block.inputs)[0], time_dim)
        return to_time_dim(block.inputs, block.time_dim, time_dim)

    def _time_dim(self, block: StepBlock) -> int:
        # An unbatched nn.LSTM takes [T, F] whatever batch_first says.
        unbatched = isinstance(self.recurrence.module, torch.nn.RNNBase) and (
            tensors_of(block.inputs)[0].dim() == 2
        )
        return 0 if unbatched else self.recurrence.time_dim

    def _give_segment(self, block: StepBlock, outputs: Tree, num_steps: int, sink: Sink) -> None:
        time_dim, wanted = self._time_dim(block), block.stop - block.start
        if wanted < num_steps:
            first = num_steps - wanted
            outputs = map_tensors(lambda t: t.narrow(time_dim, first, wanted), outputs)
        targets = to_time_dim(block.targets, block.time_dim, time_dim)
        sink.take_segment(outputs, targets, block.step_weights(), wanted, time_dim)

    def _autocast(self, task: WindowTask, state: Tree) -> AbstractContextManager[None]:
        """Autocast as the user wants it, whoever turned it on."""
        device_type = self._device_type(task, state)
        if self._autocast_dtype is not None:
            return _uncached(torch.autocast(device_type, dtype=self._autocast_dtype))
        nested = torch.is_autocast_enabled(device_type)
        return _uncached(_NOTHING) if nested else _NOTHING

    def _device_type(self, task: WindowTask, state: Tree) -> str:
        """Where the steps run: with the weights, and those of a function with what it is given."""
        if self._weights:
            return self._weights[0].device.type
        types = (t.device.type for t in iterate_tensors((state, task.blocks[0].inputs)))
        return next((kind for kind in types if kind != "cpu"), "cpu")


@contextmanager
def _uncached(autocast: AbstractContextManager[Any]) -> Iterator[None]:
    """Autocast without its weight cache from run to run.

    A cast weight that was cached without a graph, or with one that is freed by now, would
    cut the weight off from its gradient.
    """
    torch.clear_autocast_cache()
    with autocast:
        yield
    torch.clear_autocast_cache()


class _Rejoin(torch.autograd.Function):
    """The value of a recorded state, the gradient of the recomputed one."""

    @staticmethod
    def forward(_ctx: Any, recorded: Tensor, _recomputed: Tensor) -> Tensor:
        return recorded.clone()

    @staticmethod
    def backward(_ctx: Any, *grads: Any) -> Any:
        return None, *grads


def rejoin(task: WindowTask, step: int, state: Tree) -> Tree:
    """The state from which `step` starts: the recorded one at a joint, else `state`."""
    joint = task.joints.get(step)
    if joint is None:
        return state
    check_same_structure(state, joint.state)
    pairs = zip(tensors_of(joint.state), tensors_of(state), strict=True)
    joined = [
        _Rejoin.apply(recorded, recomputed)  # type: ignore[no-untyped-call]
        if is_differentiable(recorded)
        else recorded
        for recorded, recomputed in pairs
    ]
    return replace_tensors(joint.state, joined)


def check_same_structure(state: Tree, expected: Tree) -> None:
    """Raise `ArgumentError` unless a state is nested like the one before."""
    if structure(state) != structure(expected):
        raise ArgumentError(
            f"the module returned a state of another structure: {structure(state)} "
            f"instead of {structure(expected)}"
        )


def make_runner(
    module: object,
    per_step: bool | None,
    time_dim: int,
    autocast_dtype: torch.dtype | None,
    lane_dim: int | None = None,
) -> Runner:
    """A runner for the user's module."""
    check_time_dim(time_dim)
    check_lane_dim(lane_dim)
    if autocast_dtype is not None and not (
        isinstance(autocast_dtype, torch.dtype) and autocast_dtype.is_floating_point
    ):
        raise ArgumentError(
            f"autocast_dtype={autocast_dtype!r} must be a floating dtype such as torch.bfloat16"
        )
    check_initialised("module", module)
    check_autocast(module, autocast_dtype)
    return Runner(recognise(module, per_step, time_dim, lane_dim), autocast_dtype)


def check_lane_dim(lane_dim: object) -> None:
    """Raise `ArgumentError` unless `lane_dim` is None or an int of at least 0."""
    if lane_dim is not None and (
        not isinstance(lane_dim, int) or isinstance(lane_dim, bool) or lane_dim < 0
    ):
        raise ArgumentError(f"lane_dim={lane_dim!r} must be an integer of at least 0, or None")
