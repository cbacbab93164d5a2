"""Profiles from code: what one window takes, and what several strategies take."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Annotated, Any

from tbptt_ckpt.arguments import Dimension, PositiveInt, checked, checked_where_used
from tbptt_ckpt.budget.amount import MemoryBudget
from tbptt_ckpt.data.source import described
from tbptt_ckpt.engine.options import ExecutorName, Overlap
from tbptt_ckpt.errors import ArgumentError, shown
from tbptt_ckpt.executor.window_pass import Executor
from tbptt_ckpt.module.inside import name_of
from tbptt_ckpt.profiling.bench import BenchHere
from tbptt_ckpt.profiling.configuration import BenchError, Configuration, combinations
from tbptt_ckpt.profiling.process import ProcessBench
from tbptt_ckpt.profiling.report import FAILED, MemoryReport
from tbptt_ckpt.profiling.strategy_report import StrategyReport
from tbptt_ckpt.profiling.sweep import Bench, Watch, measured, sweep, unwatched
from tbptt_ckpt.profiling.workload import Workload
from tbptt_ckpt.schedule.strategies import AnyStrategy, parse_strategy
from tbptt_ckpt.time_batching.policy import TimeBatchingChoice
from tbptt_ckpt.updates.updater import AnyOptimizer

# The peaks of all but `auto`, which chooses by measured times, repeat to the byte.
DEFAULT_STRATEGIES = ("step", "uniform:32", "sqrt", "revolve:20", "auto")
_BY_DEFAULT = tuple(map(parse_strategy, DEFAULT_STRATEGIES))
# Each of them is looked at when configurations are made.
Strategies = Annotated[Sequence[AnyStrategy], checked_where_used]
_OPTIONS = ("loss", "reduction", "clip_grad_norm", "autocast_dtype")


@checked
def profile_window(
    module: Callable[..., Any],
    loss_fn: Callable[[Any, Any], Any],
    inputs: Any,
    targets: Any,
    init_state: Any = None,
    *,
    k1: int,
    k2: int,
    optimizer: AnyOptimizer | None = None,
    strategy: AnyStrategy = "auto",
    memory_budget: MemoryBudget = None,
    overlap: Overlap = "refresh",
    executor: ExecutorName | Executor = "replay",
    time_batching: TimeBatchingChoice = "auto",
    per_step: bool | None = None,
    time_dim: Dimension | None = None,
    repeats: PositiveInt = 3,
    trace: bool = True,
    **options: Any,
) -> MemoryReport:
    """What one warm window takes in memory and time: measured here, in this process.

    Tensor peaks are exact and repeat on the CPU to the byte. Resident memory includes
    whatever the process did before; `profile_strategies(..., fresh_processes=True)` and the
    command `tbptt-ckpt profile` measure in processes of their own.

    Windows run on copies of module and optimizer; yours, their gradients and the random
    generators stay as they are. The steps are read over and over as those of a stream, so
    that a few hundred serve any `k2`; they count for the window that is being run only.

    Arguments that are not explained here are those of `TBPTT`, and so are the `options`: `loss`,
    `reduction`, `clip_grad_norm` and `autocast_dtype`. `inputs` are nested tensors with time on
    `time_dim`, such as [T, B, F], and `targets` such as [T, B]; `time_dim` is 1 for modules with
    `batch_first` and otherwise 0, unless it is given. `init_state` is the state at the first
    step. The optimizer's state counts and its step is timed; None leaves both out. A
    `memory_budget` that does not fit gives a report that says so. `repeats` windows are timed
    without the meter, which runs for one more; `trace` says whether the report shall hold that
    one in time.

    Returns:
        A report, also where memory or the budget did not suffice: see its `status`.

    Raises:
        ArgumentError: An argument that cannot work.
    """
    (configuration,) = combinations(
        (k1,),
        (k2,),
        (strategy,),
        (memory_budget,),
        overlap=overlap,
        executor=executor,
        time_batching=time_batching,
    )
    work = make_work(
        module, loss_fn, inputs, targets, init_state, optimizer, per_step, time_dim, options
    )
    try:
        return measured(BenchHere(work, configuration), repeats, trace=trace)
    except BenchError as error:
        if error.status == FAILED and error.__cause__ is not None:
            raise error.__cause__ from None
        return configuration.report(status=error.status, message=error.message)


@checked
def profile_strategies(
    module: Callable[..., Any],
    loss_fn: Callable[[Any, Any], Any],
    inputs: Any,
    targets: Any,
    init_state: Any = None,
    *,
    k1: int | Sequence[int],
    k2: int | Sequence[int],
    optimizer: AnyOptimizer | None = None,
    strategies: Strategies = _BY_DEFAULT,
    memory_budgets: Sequence[int | float | str | None] = (None,),
    overlap: Overlap = "refresh",
    executor: ExecutorName | Executor = "replay",
    time_batching: TimeBatchingChoice = "auto",
    per_step: bool | None = None,
    time_dim: Dimension | None = None,
    repeats: PositiveInt = 3,
    traces: bool = False,
    fresh_processes: bool = False,
    watch: Watch = unwatched,
    **options: Any,
) -> StrategyReport:
    """What several strategies take for the same windows; plain BPTT is always a row.

    Every combination of `k1`, `k2`, strategy and budget is a row. Rows are timed in turns
    with plain BPTT, which retains everything and batches nothing over time, and `ratio` is
    the median of the ratios of neighbours. On an accelerator, and where plain BPTT takes much of
    the memory, it is gone by then: `ratio` is that of the medians, and has no range.

    Arguments that are not explained here are those of `profile_window`. `k1` and `k2` are one
    number or several; `memory_budgets` are bytes, sizes such as "512MiB", or None for no budget;
    `repeats` windows are timed for each row; `traces` says whether rows shall hold their window
    in time; `watch` is told before every stage. With `fresh_processes` each row is measured in
    a process of its own, so that its resident memory is its own too: everything is pickled
    then, and a script needs its `if __name__ == "__main__":`.

    Returns:
        A report with a row for each configuration, also for those that could not run.

    Raises:
        ArgumentError: An argument that cannot work; a module that fails in plain BPTT.
    """
    configurations = combinations(
        _several(k1),
        _several(k2),
        strategies,
        memory_budgets,
        overlap=overlap,
        executor=executor,
        time_batching=time_batching,
    )
    work = make_work(
        module, loss_fn, inputs, targets, init_state, optimizer, per_step, time_dim, options
    )

    def open_bench(configuration: Configuration) -> AbstractContextManager[Bench]:
        if fresh_processes:
            return ProcessBench(partial(copy.copy, work), configuration)
        return nullcontext(BenchHere(work, configuration))

    what = f"{name_of(module)} on {described(inputs)}"
    return sweep(configurations, open_bench, repeats=repeats, traces=traces, watch=watch, what=what)


def make_work(
    module: Callable[..., Any],
    loss_fn: Callable[[Any, Any], Any],
    inputs: Any,
    targets: Any,
    init_state: Any,
    optimizer: Any,
    per_step: bool | None,
    time_dim: int | None,
    options: dict[str, Any],
) -> Workload:
    """The work that these arguments describe."""
    unknown = sorted(set(options) - set(_OPTIONS))
    if unknown:
        raise ArgumentError(
            f"{unknown[0]}={shown(options[unknown[0]])} is not an argument of a profile"
        )
    return Workload(
        module=module,
        loss_fn=loss_fn,
        inputs=inputs,
        targets=targets,
        init_state=init_state,
        optimizer=optimizer,
        per_step=per_step,
        time_dim=time_dim,
        **options,
    )


def _several(given: int | Sequence[int]) -> Sequence[int]:
    return given if isinstance(given, Sequence) else (given,)
