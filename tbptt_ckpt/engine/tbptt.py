"""`TBPTT`: truncated backpropagation through time over a sequence of any length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import torch

from tbptt_ckpt.arguments import AboveZero, Dimension, PositiveInt, checked
from tbptt_ckpt.budget.amount import MemoryBudget
from tbptt_ckpt.data.batches import Sequences
from tbptt_ckpt.data.source import Steps
from tbptt_ckpt.engine.evaluation import Evaluation, run_evaluation
from tbptt_ckpt.engine.finite import FiniteLoss
from tbptt_ckpt.engine.options import (
    K2_TOLERANCE,
    AnyK2,
    AnyRanks,
    DeliverName,
    ExecutorName,
    LossSteps,
    Options,
    Overlap,
    Reduction,
)
from tbptt_ckpt.engine.parts import Parts, make_parts
from tbptt_ckpt.engine.results import TrainResult, WindowResult
from tbptt_ckpt.engine.sequence_run import SequenceRun
from tbptt_ckpt.executor.losses import LossFunction
from tbptt_ckpt.executor.observer import UNOBSERVED, Observer
from tbptt_ckpt.executor.window_pass import Executor
from tbptt_ckpt.module.recurrence import check_differentiable, check_time_dim, recognise
from tbptt_ckpt.schedule.costs import Costs
from tbptt_ckpt.schedule.strategies import AnyStrategy
from tbptt_ckpt.schedule.truncation import AnyTruncation
from tbptt_ckpt.time_batching.compiler import CompileChoice
from tbptt_ckpt.time_batching.policy import BatchedOperation, TimeBatchingChoice
from tbptt_ckpt.updates.updater import AnyOptimizer


class TBPTT:
    """Updates the weights every `k1` steps, from gradients that reach `k2` steps back.

    Consecutive windows overlap where `k2 > k1`. No graph is retained for the overlap:
    detached states are kept at segment boundaries, and segments are recomputed in each
    window's backward. The gradient is fixed by `(k1, k2, loss, overlap, truncation)`;
    `strategy` and `executor` change only memory and time.

    Args:
        module: Per step `(x_t, state) -> (y_t, state)`, or over a segment
            `(x[t0:t1], state) -> (y[t0:t1], state)`. `nn.RNN/LSTM/GRU` and their cells are
            recognised. A function works too, but buffers of modules that it calls are not
            found.
        loss_fn: `(y, target) -> ` the result of a loss of torch's, another scalar that is the
            mean over the steps given, or `(loss_sum, weight)`. It must be a function of its
            arguments.
        k1: Steps between updates.
        k2: Steps an update reaches back; None reaches back to the start of the sequence, "auto"
            as far as audits find that it matters.
        optimizer: Steps once per window, or per `accumulate` windows. None lets gradients
            accumulate in `.grad`.
        loss: "new" takes the losses of a window's new steps, "last" that of its last step.
        reduction: "mean" divides a window's summed loss by its summed weight (the number
            of loss steps, where no weight is given), "sum" does not.
        overlap: "refresh" runs the whole window with today's weights; "stale" restarts each
            block of `k1` steps from the state recorded when it was new: cheaper, and not
            the exact gradient once weights have moved.
        truncation: "fixed" differentiates the whole window; "roulette", or a `Roulette`, stops the
            gradient at a border by lot and divides what goes on, so that its mean is the whole
            window's.
        max_k2: Under `k2="auto"` how far back audits reach, and windows at most: a multiple of
            `k1`.
        k2_tolerance: Under `k2="auto"` how large the mean of what is cut off may be, relative to
            the mean gradient.
        k2_window_tolerance: Under `k2="auto"` what 19 of 20 windows may miss, relative to a running
            norm of the gradient; None for anything.
        strategy: "auto" or "optimal": the fastest plan within the memory budget, or, where none
            is given, within the free memory. "retain", "step", "sqrt", "uniform:LENGTH",
            "revolve:STATES", the equal object, a list of actions, or a function
            `(start, stop) -> actions`.
        memory_budget: Peak of tensor memory on the device, everything included: bytes, text
            such as "512MiB", or a fraction of what is free; "8GiB reserved" is of what an
            accelerator's allocator reserves. The first window measures what
            steps take. With a fixed strategy the budget is only checked.
        executor: "replay" holds the graph of one leaf at a time; "checkpoint" is one graph
            of nested `torch.utils.checkpoint` calls; or an executor, such as
            `CheckpointExecutor(context_fn)` for selective recomputation.
        time_batching: Whether weight gradients and products of the inputs are made over all
            steps of a segment at once: True wherever it can be, "fused" too, with torch's
            kernel for an `nn.LSTMCell`, "mixed" with that in advances alone, False nowhere, "auto"
            where it gains time: by a rule of sizes, or, where costs are measured, in the form
            whose plan takes the least time. Gradients agree to rounding.
        compile: Whether the steps of a module of one step are run by blocks of 16 that
            `torch.compile` makes: True, "auto" where the run is long enough to earn it back and
            a compiler is there, the name of a backend, or a dict of what `torch.compile` takes as
            `backend`, `mode` and `options`. It takes half a minute to some minutes once, at the
            begin of a window. Measured plans have leaves of whole blocks, and where no block fits
            steps run uncompiled.
        per_step: Whether an unrecognised module takes one step (the default) or a segment; it
            must be said of modules that contain an `nn.RNN/LSTM/GRU`.
        time_dim: Where a segment module wants time, 0 by default; `batch_first` sets it.
        clip_grad_norm: Largest gradient norm of an update.
        autocast_dtype: Run module and loss under autocast with this dtype.
        scaler: A `torch.amp.GradScaler`.
        scheduler: Stepped after each update.
        lane_dim: Where lanes are in the tensors of a state, for sources that reset lanes. By
            default 1 for `nn.RNN/LSTM/GRU` and modules that contain one, 0 for others.
        accumulate: Windows with a loss per update. With reduction "mean" the update takes the
            mean of their gradients, with "sum" their sum. A group that the end of the
            sequence leaves short updates as it is.
        deliver: Weights with hooks, and those of `DistributedDataParallel`, get a window's gradient
            at once, when it is complete; with "once" all do, for what hangs on the accumulation of
            gradients and cannot be seen. It takes the gradients of a leaf once more, and a look at
            its graph.
        ranks: "all", or `Ranks(...)`: all ranks of `torch.distributed`, each with its own lanes,
            make every update together, with the gradient that one process has of all their lanes.
            Gradients are reduced once per update: by `DistributedDataParallel` where the module is
            in one, otherwise by one all-reduce. All make and call this in the same order; a rank
            whose sequence is shorter takes part in the updates of the others. None leaves all
            of that to the caller.
        costs: What the module takes, as `measure_costs` gives it; nothing is measured then,
            except that under a memory budget segments of up to 8 steps are run first, and bytes
            that are given too low are raised to theirs.
        measure_memory: Whether every window's peak is measured; see `peak_memory` for what
            that costs.
        check_replays: Whether `executor="replay"` holds the state that each leaf reaches against
            the one that its first run reached; where gradients accumulate it copies them.
        check_finite: Whether `train` and `windows` raise `NonFiniteError` at the first loss that is
            NaN or infinite, before its update. A `Trainer` has its own policy, `NonFinite`.
        observer: Told of every action as it is run; see `tbptt_ckpt.executor.Observer`.

    Raises:
        ArgumentError: An argument that cannot work.
        RankError: Ranks were given different arguments or weights.

    References:
        Williams & Peng (1990), doi:10.1162/neco.1990.2.4.490; Sutskever (2013), PhD thesis,
        section 2.8.6.
    """

    @checked
    def __init__(
        self,
        module: Callable[..., Any],
        loss_fn: Callable[[Any, Any], Any],
        k1: PositiveInt,
        k2: AnyK2,
        optimizer: AnyOptimizer | None = None,
        *,
        loss: LossSteps = "new",
        reduction: Reduction = "mean",
        overlap: Overlap = "refresh",
        truncation: AnyTruncation = "fixed",
        max_k2: PositiveInt | None = None,
        k2_tolerance: AboveZero = K2_TOLERANCE,
        k2_window_tolerance: AboveZero | None = None,
        strategy: AnyStrategy = "auto",
        memory_budget: MemoryBudget = None,
        executor: ExecutorName | Executor = "replay",
        time_batching: TimeBatchingChoice = "auto",
        compile: CompileChoice = False,  # noqa: A002
        per_step: bool | None = None,
        time_dim: Dimension | None = None,
        clip_grad_norm: AboveZero | None = None,
        autocast_dtype: torch.dtype | None = None,
        scaler: Any = None,
        scheduler: Any = None,
        lane_dim: Dimension | None = None,
        accumulate: PositiveInt = 1,
        deliver: DeliverName = "auto",
        ranks: AnyRanks = None,
        costs: Costs | None = None,
        measure_memory: bool = False,
        check_replays: bool = True,
        check_finite: bool = True,
        observer: Observer = UNOBSERVED,
    ) -> None:
        arguments = locals()
        self._options = Options(**{field.name: arguments[field.name] for field in fields(Options)})
        recurrence = recognise(module, per_step, time_dim, lane_dim)
        check_time_dim(recurrence, time_dim)
        self._parts = make_parts(recurrence, loss_fn, optimizer, self._options, observer=observer)

    def __repr__(self) -> str:
        options, name = self._options, type(self._parts.recurrence.module).__name__
        return (
            f"TBPTT({name}, k1={options.k1}, k2={options.k2}, {options.overlap} overlap, "
            f"strategy {self._parts.budget.strategy}, executor {self._parts.executor})"
        )

    @property
    def options(self) -> Options:
        """The arguments, checked."""
        return self._options

    @property
    def parts(self) -> Parts:
        """What runs; `Trainer` runs on it."""
        return self._parts

    @property
    def batched_operations(self) -> list[BatchedOperation]:
        """What time batching has done so far, and what it left to the plain operation and why."""
        return self._parts.runner.time_batching.report()

    def train(self, sequence: Steps, init_state: Any = None) -> TrainResult:
        """Run a whole sequence, one update per window.

        Args:
            sequence: An iterable of `(input, target)` steps, a `TensorSequence`, or a source.
                A target None is absent.
            init_state: The state at step 0 and of lanes that reset, nested in any way; a
                `SharedState`; None if the module accepts it.

        Raises:
            ArgumentError: A sequence, state or module that cannot work.
            InfeasibleBudgetError: No plan fits the memory budget: before the first window, or,
                where steps turn out to take more than was measured, before the update of a later
                one.
            NonFiniteError: A loss is NaN or infinite; its window made no update.
            RankError: Ranks have come to hold different weights, or one is gone.
            StaleWeightsError: Weights changed inside a window.
            ReplayMismatchError: Steps that ran again reached another state than at first.
        """
        run = self._start(sequence, init_state)
        for _ in run:
            pass
        return run.result()

    def windows(self, sequence: Steps, init_state: Any = None) -> Iterator[WindowResult]:
        """Run a sequence one window at a time; arguments and errors as for `train`.

        When a window is yielded the optimizer has stepped and `.grad` still holds the
        window's gradient, after clipping. With `accumulate` it holds the sum of the group so far,
        and what the optimizer has stepped with where it has. The next window runs when the
        next one is asked for.
        """
        return iter(self._start(sequence, init_state))

    @checked
    def evaluate(
        self, sequence: Sequences, init_state: Any = None, *, segment_steps: PositiveInt = 64
    ) -> Evaluation:
        """Mean loss of a sequence, as the function `evaluate` gives it.

        It may be called between two windows of a run, whose state it leaves alone.

        Args:
            sequence: As for `train`, or `Batches`.
            init_state: As for `train`.
            segment_steps: Steps read at a time, and run at a time by segment modules.

        Raises:
            ArgumentError: A sequence, state or module that cannot work.
        """
        parts = self._parts
        loss_function = LossFunction(parts.loss_function.loss_fn)
        return run_evaluation(
            parts.runner.anew(), loss_function, sequence, init_state, segment_steps
        )

    def _start(self, sequence: Steps, init_state: Any) -> SequenceRun:
        check_differentiable(self._parts.recurrence.module)
        watch = FiniteLoss() if self._options.check_finite else UNOBSERVED
        return SequenceRun(self._options, self._parts, sequence, init_state, watch)
