"""The profiling job: options in, a report and its files out."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from tbptt_ckpt import Workload
from tbptt_ckpt.cli.devices import find_device
from tbptt_ckpt.cli.files import write_text
from tbptt_ckpt.cli.models import make_task
from tbptt_ckpt.cli.profile.config import ProfileConfig
from tbptt_ckpt.profiling.figures import write_figure
from tbptt_ckpt.profiling.process import ProcessBench
from tbptt_ckpt.profiling.strategy_report import StrategyReport
from tbptt_ckpt.profiling.sweep import Watch, sweep, unwatched
from tbptt_ckpt.profiling.trace import trace_json


def make_workload(config: ProfileConfig) -> Workload:
    """Model, optimizer and data, in whatever process it is called."""
    return make_task(config).workload


def _described(config: ProfileConfig) -> str:
    has_lanes = ":" not in config.model or "lanes" in config.given
    data = "" if config.data is None else f" on {config.data}"
    return f"{config.model}{data}" + (f", {config.lanes} lanes" if has_lanes else "")


def run_profile(
    config: ProfileConfig, watch: Watch = unwatched, *, command: str = ""
) -> StrategyReport:
    """Measure every row in a process of its own and write the files asked for."""
    config.check()
    find_device(config.device)  # refused here rather than in every process
    make = partial(make_workload, config)
    report = sweep(
        config.configurations(),
        lambda configuration: ProcessBench(make, configuration),
        repeats=config.repeats,
        traces=bool(config.plot or config.trace),
        history=config.history_of,
        watch=watch,
        what=_described(config),
    )
    report = replace(report, command=command)
    if config.csv is not None:
        write_text("--csv", config.csv, report.to_csv(), force=config.force)
    if config.trace is not None:
        write_text("--trace", config.trace, trace_json(report.rows), force=config.force)
    if config.plot is not None and config.window_plot is not None:
        write_figure(report.plot().figure, config.plot)
        write_figure(report.plot_windows(), config.window_plot)
    return report
