"""The profiling job: options in, a report and its files out."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tbptt_ckpt.cli.bytes.corpus import ByteLanes, load_corpus
from tbptt_ckpt.cli.bytes.models import build_model, check_model, initial_state
from tbptt_ckpt.cli.bytes.score import byte_work
from tbptt_ckpt.cli.configs import ProfileConfig
from tbptt_ckpt.cli.devices import DTYPES, find_device
from tbptt_ckpt.cli.files import write_text
from tbptt_ckpt.profiling.plots import plot_front, plot_windows
from tbptt_ckpt.profiling.process import ProcessBench
from tbptt_ckpt.profiling.report import StrategyReport
from tbptt_ckpt.profiling.sweep import Watch, sweep, unwatched
from tbptt_ckpt.profiling.trace import trace_json
from tbptt_ckpt.profiling.workload import Workload

_LEARNING_RATE = 4e-3


@dataclass(frozen=True, slots=True)
class ByteWorkload:
    """Makes model, optimizer and data in whatever process it is called."""

    config: ProfileConfig

    def __call__(self) -> Workload:
        """The model with its optimizer, at the beginning of the text."""
        config = self.config
        torch.manual_seed(0)
        device = find_device(config.device)
        corpus = load_corpus(config.data, config.lanes)
        source = ByteLanes(corpus.train, config.lanes, device=device)
        module = build_model(config.model, hidden=config.hidden, layers=config.layers)
        module = module.to(device, DTYPES[config.dtype])
        inputs, _ = source.read(0, min(2, len(source)))
        check_model(config.model, module, inputs, config.lanes)
        state = initial_state(module, config.lanes)
        return byte_work(module, source, lr=_LEARNING_RATE, dtype=config.dtype, init_state=state)


def run_profile(config: ProfileConfig, watch: Watch = unwatched) -> StrategyReport:
    """Measure every row in a process of its own and write the files asked for."""
    config.check()
    find_device(config.device)  # refused here rather than in every process
    workload = ByteWorkload(config)
    report = sweep(
        config.configurations(),
        lambda configuration: ProcessBench(workload, configuration),
        repeats=config.repeats,
        traces=bool(config.plot or config.trace),
        history=config.history_of,
        watch=watch,
    )
    if config.csv is not None:
        write_text("--csv", config.csv, report.to_csv(), force=config.force)
    if config.trace is not None:
        write_text("--trace", config.trace, trace_json(report.rows), force=config.force)
    if config.plot is not None and config.window_plot is not None:
        plot_front(report, config.plot)
        plot_windows(report, config.window_plot)
    return report
