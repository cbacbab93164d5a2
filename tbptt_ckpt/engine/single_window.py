"""One window for people who own their training loop: its gradient, or its outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import noop_context_fn

from tbptt_ckpt.arguments import Dimension, checked
from tbptt_ckpt.data.blocks import StepBlock
from tbptt_ckpt.data.tensors import TensorSequence
from tbptt_ckpt.engine.options import DeliverName, ExecutorName, Options, Reduction
from tbptt_ckpt.engine.parts import make_parts
from tbptt_ckpt.engine.results import WindowResult
from tbptt_ckpt.engine.sequence_run import SequenceRun
from tbptt_ckpt.executor.block_forms import Wanted
from tbptt_ckpt.executor.checkpoint import CheckpointedSpans, ContextFn
from tbptt_ckpt.executor.observer import UNOBSERVED, Observer
from tbptt_ckpt.executor.replay_check import UNCHECKED, CheckInBackward
from tbptt_ckpt.executor.runner import make_runner
from tbptt_ckpt.executor.sinks import Sink
from tbptt_ckpt.executor.spans import parse_spans
from tbptt_ckpt.executor.window_pass import Executor, WindowPass
from tbptt_ckpt.module.ambient import Ambient
from tbptt_ckpt.module.recurrence import check_differentiable, parameters_of, recognise, time_of
from tbptt_ckpt.module.trees import Tree, replace_tensors, tensors_of
from tbptt_ckpt.schedule.plan import plan_window
from tbptt_ckpt.schedule.strategies import AnyStrategy, Strategy
from tbptt_ckpt.time_batching.compiler import CompileChoice
from tbptt_ckpt.time_batching.policy import TimeBatchingChoice

X = TypeVar("X")  # inputs
Y = TypeVar("Y")  # outputs
S = TypeVar("S")  # states


@checked
def run_window(
    module: Callable[..., Any],
    loss_fn: Callable[[Any, Any], Any],
    inputs: Any,
    targets: Any,
    init_state: Any = None,
    *,
    weight: Tensor | None = None,
    strategy: AnyStrategy = "auto",
    executor: ExecutorName | Executor = "replay",
    time_batching: TimeBatchingChoice = "auto",
    compile: CompileChoice = False,  # noqa: A002
    reduction: Reduction = "mean",
    per_step: bool | None = None,
    time_dim: Dimension | None = None,
    autocast_dtype: torch.dtype | None = None,
    deliver: DeliverName = "auto",
    check_replays: bool = True,
    observer: Observer = UNOBSERVED,
) -> WindowResult:
    """Differentiate one window over all the given steps; gradients accumulate in `.grad`.

    Args:
        module: As for `TBPTT`.
        loss_fn: As for `TBPTT`.
        inputs: Nested tensors with time on `time_dim`, such as [T, B, F].
        targets: The same, such as [T, B].
        init_state: The state at the first step.
        weight: [T] or [T, B], as for `TensorSequence`.
        strategy: As for `TBPTT`.
        executor: As for `TBPTT`.
        time_batching: As for `TBPTT`.
        compile: As for `TBPTT`.
        reduction: As for `TBPTT`.
        per_step: As for `TBPTT`.
        time_dim: Where time is; by default 1 for modules with `batch_first`, otherwise 0.
        autocast_dtype: As for `TBPTT`.
        deliver: As for `TBPTT`.
        check_replays: As for `TBPTT`.
        observer: As for `TBPTT`.

    Raises:
        ArgumentError: An argument that cannot work.
    """
    time_dim, recurrence = time_of(recognise(module, per_step, time_dim), time_dim, inputs)
    sequence = TensorSequence(inputs, targets, time_dim=time_dim, weight=weight)
    options = Options(
        k1=len(sequence),
        k2=None,
        reduction=reduction,
        strategy=strategy,
        executor=executor,
        autocast_dtype=autocast_dtype,
        time_batching=time_batching,
        compile=compile,
        deliver=deliver,
        check_replays=check_replays,
    )
    parts = make_parts(recurrence, loss_fn, None, options, observer=observer, measured=False)
    run = SequenceRun(options, parts, sequence, init_state)
    (window,) = run
    grads = run.initial.over_lanes(run.state_grads) or [None] * len(tensors_of(init_state))
    return replace(window, init_state_grad=replace_tensors(init_state, list(grads)))


@checked
def unroll(
    module: Callable[[X, S], tuple[Y, S]],
    inputs: X,
    init_state: S | None = None,
    *,
    strategy: AnyStrategy = "auto",
    compile: CompileChoice = False,  # noqa: A002
    per_step: bool | None = None,
    time_dim: Dimension | None = None,
    autocast_dtype: torch.dtype | None = None,
    context_fn: ContextFn = noop_context_fn,
    check_replays: bool = True,
) -> tuple[Y, S]:
    """Run a module over a sequence so that the result can be differentiated in little memory.

    Segments are recomputed in the backward, nested as the strategy says. All outputs are
    returned, so they take memory for every step, and so does the graph itself: 12-20 KiB of
    host memory per step in a loop over cells. `run_window` has neither cost.

    Args:
        module: As for `TBPTT`.
        inputs: Nested tensors with time on `time_dim`, such as [T, B, F].
        init_state: The state at the first step; gradients flow to it.
        strategy: As for `TBPTT`.
        compile: As for `TBPTT`.
        per_step: As for `TBPTT`.
        time_dim: Where time is; by default 1 for modules with `batch_first`, otherwise 0.
        autocast_dtype: As for `TBPTT`.
        context_fn: Passed to `torch.utils.checkpoint`, for selective recomputation.
        check_replays: Whether your backward raises `ReplayMismatchError` where a segment that it
            recomputes is not what it was.

    Returns:
        The outputs, with time on `time_dim`, and the final state.

    Raises:
        ArgumentError: An argument that cannot work.
    """
    time_dim, recurrence = time_of(recognise(module, per_step, time_dim), time_dim, inputs)
    check_differentiable(module)
    runner = make_runner(recurrence, autocast_dtype, compile=compile)
    sequence = TensorSequence(inputs, time_dim=time_dim)
    inputs, num_steps = sequence.inputs, len(sequence)
    options = Options(k1=num_steps, k2=None, strategy=strategy, compile=compile)
    plan = plan_window(options.parsed_strategy(), 0, 0, num_steps)
    tensors = [*parameters_of(module), *tensors_of(init_state), *tensors_of(inputs)]
    # With the inputs as targets every step has one, so that every output is collected.
    block = StepBlock(0, num_steps, inputs, inputs, None, time_dim)
    ambient = Ambient([runner.recurrence.module], tensors)
    wanted = Wanted(plan.longest_leaf, run_steps=num_steps)
    if runner.compiled.look([block], 0, init_state, wanted):
        runner.time_batching.decide("compiled")
    whole = WindowPass([block], 0, 0, num_steps, 0, ambient, runner)
    strategy = options.parsed_strategy()
    found = run_in_graph(whole, strategy, init_state, context_fn, check_replays=check_replays)
    ambient.check_complete()
    return found


class _LateOutputs(Sink):
    """Keeps the outputs of the steps from `start` on."""

    def __init__(self, start: int) -> None:
        super().__init__()
        self._start = start

    def wanted(self, begin: int, end: int) -> range:
        return range(max(begin, self._start), end)


def run_in_graph(
    window: WindowPass,
    strategy: Strategy,
    state: Tree,
    context_fn: ContextFn = noop_context_fn,
    *,
    check_replays: bool,
    recomputes_all: bool = False,
) -> tuple[Tree, Tree]:
    """The outputs of a window's steps from `loss_start` on and its last state, with their graph.

    With `recomputes_all` that keeps nothing but the first state.
    """
    first_run: list[Sink] = []
    in_backward = False

    def new_sink() -> Sink:
        sink = _LateOutputs(window.loss_start)
        if not in_backward:  # what recomputations make must not outlive them
            first_run.append(sink)
        return sink

    plan = plan_window(strategy, window.start, window.start, window.stop)
    check = CheckInBackward(window) if check_replays else UNCHECKED
    spans = CheckpointedSpans(window, new_sink, context_fn, check)
    run = spans.run_again_as_a_whole if recomputes_all else spans.run
    collected, state = run(parse_spans(plan.schedule, window.start, window.stop), state)
    frame = next(sink.outputs[0] for sink in first_run if sink.outputs)
    in_backward, time_dim = True, window.blocks[-1].time_dim
    first_run.clear()
    return _over_time(collected, frame, window.runner.recurrence.per_step, time_dim), state


def _over_time(collected: list[Tensor], frame: Tree, per_step: bool, time_dim: int) -> Tree:
    """Outputs of steps, or of segments, as one tree."""
    join = torch.stack if per_step else torch.cat
    width = len(tensors_of(frame))
    columns = [collected[leaf::width] for leaf in range(width)]
    return replace_tensors(frame, [join(column, dim=time_dim) for column in columns])
