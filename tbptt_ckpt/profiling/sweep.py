"""Measures configuration after configuration, each against plain BPTT."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Protocol, TypeVar

from tbptt_ckpt.arguments import PositiveInt, checked
from tbptt_ckpt.memory.available import free_memory
from tbptt_ckpt.profiling.bench import WindowBench
from tbptt_ckpt.profiling.configuration import BenchError, Configuration, ProfileError
from tbptt_ckpt.profiling.environment import describe_environment
from tbptt_ckpt.profiling.report import FAILED, MemoryReport
from tbptt_ckpt.profiling.strategy_report import StrategyReport

# Plain BPTT is kept at hand, to be timed in turns, where it takes no more than this.
_KEPT_PART_OF_FREE = 0.25

T = TypeVar("T")


class Bench(Protocol):
    """Has a `WindowBench` of one configuration somewhere."""

    def ask(self, request: Callable[[WindowBench], T]) -> T:
        """What a method of `WindowBench`, or `partial` of one, returns; else `BenchError`."""
        ...


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a long job stands, for whoever watches it.

    Attributes:
        stage: What is being done.
        done: Rows of a profile, or steps of a training run, that are done.
        total: Those there will be.
        figures: What is known so far, in words for people.
    """

    stage: str
    done: int
    total: int
    figures: str = ""


Watch = Callable[[Progress], None]


def unwatched(progress: Progress) -> None:
    """Shows nothing."""


OpenBench = Callable[[Configuration], AbstractContextManager[Bench]]


@checked
def with_baselines(configurations: Sequence[Configuration]) -> list[Configuration]:
    """The configurations, each once, plain BPTT of the same windows before the first of them."""
    pairs = ((c.baseline(), c.baseline() if c.is_baseline else c) for c in configurations)
    return list(dict.fromkeys(chain.from_iterable(pairs)))


@checked
def sweep(
    configurations: Sequence[Configuration],
    open_bench: OpenBench,
    *,
    repeats: PositiveInt,
    traces: bool = False,
    history: Callable[[Configuration], Path | None] = lambda _: None,
    watch: Watch = unwatched,
    what: str = "",
) -> StrategyReport:
    """One row for each configuration and for plain BPTT of its windows.

    Args:
        configurations: The rows wanted.
        open_bench: Makes a bench; it is closed when its row is done.
        repeats: Windows to time for each row.
        traces: Whether reports shall hold the window in time.
        history: Names a file for PyTorch's memory history of a row; None writes none.
        watch: Told before every stage.
        what: What is measured, in words.

    Raises:
        ProfileError: Plain BPTT fails for another reason than memory, so that nothing else
            would work either.
    """
    ordered = with_baselines(configurations)
    groups = {c.baseline(): [o for o in ordered if o.baseline() == c.baseline()] for c in ordered}
    reports: dict[Configuration, MemoryReport] = {}

    def tell(stage: str) -> None:
        watch(Progress(stage, len(reports), len(ordered)))

    for baseline, rows in groups.items():
        with ExitStack() as stack:
            group = _Group(baseline, open_bench, repeats, traces, history, tell, stack)
            for row in rows:
                reports[row] = group.report(row)
    found = tuple(map(reports.__getitem__, ordered))
    return StrategyReport(found, describe_environment(), what)


@dataclass(slots=True)
class _Group:
    """Configurations with the same windows, timed in turns with plain BPTT of these."""

    baseline: Configuration
    open_bench: OpenBench
    repeats: int
    traces: bool
    history: Callable[[Configuration], Path | None]
    tell: Callable[[str], None]
    stack: ExitStack  # closed when the group is done
    rival: Bench | None = None
    rival_seconds: float | None = None

    def report(self, row: Configuration) -> MemoryReport:
        """Measure a row; plain BPTT has to come first."""
        try:
            if row == self.baseline:
                return self._measure_baseline()
            with self.open_bench(row) as bench:
                return self._measure(row, bench)
        except BenchError as error:
            if row == self.baseline and error.status == FAILED:
                raise ProfileError(error.message, error.traceback) from error.__cause__
            return row.report(status=error.status, message=error.message)

    def _measure_baseline(self) -> MemoryReport:
        with ExitStack() as stack:
            bench = stack.enter_context(self.open_bench(self.baseline))
            report = self._measure(self.baseline, bench)
            self.rival_seconds, taken = report.seconds, report.rss_peak_bytes
            room = _KEPT_PART_OF_FREE * free_memory()
            if report.device == "cpu" and taken is not None and taken < room:
                self.rival = bench
                self.stack.enter_context(stack.pop_all())
        return replace(report, ratio=1.0)

    def _measure(self, row: Configuration, bench: Bench) -> MemoryReport:
        def say(stage: str) -> None:
            self.tell(f"{stage}: {row.strategy_name}, k1={row.k1}, k2={row.k2}")

        report = measured(bench, self.repeats, trace=self.traces, rival=self._time_rival, say=say)
        history = self.history(row)
        if history is not None:
            say("writing memory history")
            bench.ask(partial(WindowBench.write_history, path=history))
        if report.ratio is None and self.rival_seconds is not None:
            assert report.seconds is not None, "it was timed"
            return replace(report, ratio=report.seconds / self.rival_seconds)
        return report

    def _time_rival(self) -> float | None:
        try:
            return None if self.rival is None else self.rival.ask(WindowBench.time_window)
        except BenchError:  # gone, for memory perhaps; what it took before still serves
            self.rival = None
            return None


def measured(
    bench: Bench,
    repeats: int,
    *,
    trace: bool = False,
    rival: Callable[[], float | None] = lambda: None,
    say: Callable[[str], None] = lambda _: None,
) -> MemoryReport:
    """All figures of a bench; `rival` runs a window to compare with, if there is one."""
    say("warming up")
    before, peak = bench.ask(WindowBench.warm_up)
    say("timing")
    seconds, ratios = [], []
    for turn in range(repeats):
        theirs = rival() if turn % 2 else None
        seconds.append(bench.ask(WindowBench.time_window))
        theirs = theirs if turn % 2 else rival()
        if theirs is not None:
            ratios.append(seconds[-1] / theirs)
    say("measuring memory")
    return replace(
        bench.ask(partial(WindowBench.measure, trace=trace)),
        rss_before_bytes=before,
        rss_peak_bytes=peak,
        seconds=median(seconds),
        seconds_range=(min(seconds), max(seconds)),
        ratio=median(ratios) if ratios else None,
        ratio_range=(min(ratios), max(ratios)) if ratios else None,
    )
