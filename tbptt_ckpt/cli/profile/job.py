"""The profiling job: options in, a report and its files out."""

from __future__ import annotations

from tbptt_ckpt.cli.devices import find_device
from tbptt_ckpt.cli.files import write_text
from tbptt_ckpt.cli.profile.config import ProfileConfig
from tbptt_ckpt.cli.profile.workload import ByteWorkload
from tbptt_ckpt.profiling.plots import plot_front, plot_windows
from tbptt_ckpt.profiling.process import ProcessBench
from tbptt_ckpt.profiling.progress import Watch, unwatched
from tbptt_ckpt.profiling.report import StrategyReport
from tbptt_ckpt.profiling.sweep import sweep
from tbptt_ckpt.profiling.trace import trace_json


def run_profile(config: ProfileConfig, watch: Watch = unwatched) -> StrategyReport:
    """Measure every row in a process of its own and write the files asked for.

    Args:
        config: The options.
        watch: Told before every stage.

    Raises:
        ArgumentError: Options that cannot work; found before anything is measured.
        ProfileError: A model that fails in plain BPTT already.
    """
    config.check()
    find_device(config.device)  # refused here rather than in every process
    workload = ByteWorkload(config)
    report = sweep(
        config.configurations(),
        lambda configuration: ProcessBench(workload, configuration),
        repeats=config.repeats,
        traces=config.wants_traces,
        history=config.history_of,
        watch=watch,
    )
    _write_files(report, config)
    return report


def _write_files(report: StrategyReport, config: ProfileConfig) -> None:
    if config.csv is not None:
        write_text("--csv", config.csv, report.to_csv(), force=config.force)
    if config.trace is not None:
        write_text("--trace", config.trace, trace_json(report.rows), force=config.force)
    if config.plot is not None and config.window_plot is not None:
        plot_front(report, config.plot)
        plot_windows(report, config.window_plot)
