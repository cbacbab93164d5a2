"""The profiling job: options in, a report and its files out."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from tbptt_ckpt import Workload
from tbptt_ckpt.cli.devices import find_device
from tbptt_ckpt.cli.files import write_text
from tbptt_ckpt.cli.models import make_task
from tbptt_ckpt.cli.profile.config import ProfileConfig
from tbptt_ckpt.cli.ranks import Place, is_first, own_place, share_of, told_by_all
from tbptt_ckpt.profiling.figures import write_figure
from tbptt_ckpt.profiling.process import ProcessBench
from tbptt_ckpt.profiling.report import MemoryReport
from tbptt_ckpt.profiling.strategy_report import StrategyReport
from tbptt_ckpt.profiling.sweep import Watch, sweep, unwatched
from tbptt_ckpt.profiling.trace import trace_json


def make_workload(config: ProfileConfig, place: Place | None = None) -> Workload:
    """Model, optimizer and a rank's share of the data, in whatever process it is called."""
    return share_of(make_task(config), place).workload


def _described(config: ProfileConfig) -> str:
    has_lanes = ":" not in config.model or "lanes" in config.given
    data = "" if config.data is None else f" on {config.data}"
    return f"{config.model}{data}" + (f", {config.lanes} lanes" if has_lanes else "")


def run_profile(
    config: ProfileConfig, watch: Watch = unwatched, *, command: str = ""
) -> StrategyReport:
    """Measure every row in a process of its own and write the files asked for.

    Of several ranks each measures its own lanes, and all get the peaks of all.
    """
    config.check()
    find_device(config.device)  # refused here rather than in every process
    make = partial(make_workload, config, own_place())
    report = sweep(
        config.configurations(),
        lambda configuration: ProcessBench(make, configuration),
        repeats=config.repeats,
        traces=bool(config.plot or config.trace),
        history=config.history_of,
        watch=watch,
        what=_described(config),
    )
    report = replace(report, rows=_with_others(report.rows), command=command)
    if not is_first():
        return report
    if config.csv is not None:
        write_text("--csv", config.csv, report.to_csv(), force=config.force)
    if config.trace is not None:
        write_text("--trace", config.trace, trace_json(report.rows), force=config.force)
    if config.plot is not None and config.window_plot is not None:
        write_figure(report.plot().figure, config.plot)
        write_figure(report.plot_windows(), config.window_plot)
    return report


def _with_others(rows: tuple[MemoryReport, ...]) -> tuple[MemoryReport, ...]:
    """The rows, with what the same ones took on other ranks."""
    told = told_by_all([row.peak_bytes for row in rows])
    if told is None:
        return rows
    by_row = zip(rows, zip(*told, strict=True), strict=True)
    return tuple(replace(row, peak_bytes_of_ranks=peaks) for row, peaks in by_row)
