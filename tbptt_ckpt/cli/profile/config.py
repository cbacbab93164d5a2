"""What a profile is asked to measure: the options of `tbptt-ckpt profile`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tbptt_ckpt.cli import options
from tbptt_ckpt.cli.devices import find_device
from tbptt_ckpt.cli.files import check_target
from tbptt_ckpt.errors import ArgumentError, check_positive_int
from tbptt_ckpt.profiling.configuration import Configuration, combinations
from tbptt_ckpt.profiling.plots import pyplot
from tbptt_ckpt.profiling.profile import DEFAULT_STRATEGIES
from tbptt_ckpt.profiling.sweep import with_baselines

_TIME_BATCHING: dict[str, bool | str] = {"auto": "auto", "true": True, "false": False}
_WHOLE_NUMBERS = options.read_list(lambda _, text: int(text))


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileConfig:
    """Options of `tbptt-ckpt profile`; the defaults take some minute on two cores."""

    data: Annotated[
        Path | None, "File to read.", options.Default("the Python standard library")
    ] = None
    model: Annotated[
        str,
        "lstm, gru, rnn, lstmcell, or your own: package.module:factory or path/to/file.py:factory.",
    ] = "lstm"
    hidden: options.Hidden = 192
    layers: options.Layers = 1
    lanes: options.Lanes = 32
    k1: Annotated[
        tuple[int, ...],
        "Steps between updates; 16,64 measures both.",
        _WHOLE_NUMBERS,
        check_positive_int,
    ] = (64,)
    k2: Annotated[
        tuple[int, ...],
        "Steps an update reaches back; a list too.",
        _WHOLE_NUMBERS,
        check_positive_int,
    ] = (512,)
    strategy: Annotated[
        tuple[str, ...],
        "auto, retain, sqrt, step, uniform:LENGTH, revolve:STATES; a list too.",
        options.read_list(lambda _, text: text),
        options.check_strategy,
    ] = DEFAULT_STRATEGIES
    budget: Annotated[
        tuple[int, ...],
        "Memory budgets such as 64MiB,128MiB.",
        options.read_list(options.SIZE.parse),
        options.Default("none"),
    ] = ()
    overlap: options.Overlap = "refresh"
    executor: options.ExecutorName = "replay"
    time_batching: Annotated[
        str, "auto, true or false; plain BPTT is measured without.", options.one_of(*_TIME_BATCHING)
    ] = "auto"
    device: options.Device = None
    dtype: options.Dtype = "float32"
    repeats: Annotated[int, "Windows to time for a row.", check_positive_int] = 5
    csv: Annotated[Path | None, "Write the rows to this file."] = None
    plot: Annotated[
        Path | None,
        "Draw peak against time into this .png or .svg, and memory within each window "
        "into a second file, NAME-windows beside it.",
    ] = None
    trace: Annotated[
        Path | None, "Write the windows in time for chrome://tracing or ui.perfetto.dev."
    ] = None
    memory_history: Annotated[
        Path | None,
        "On CUDA, write PyTorch's memory history of every row for pytorch.org/memory_viz. "
        "The name gets strategy, k1 and k2.",
    ] = None
    force: Annotated[bool, "Let files be replaced."] = False

    def check(self) -> None:
        """Raise `ArgumentError` for options that cannot work, before anything is started."""
        options.check_options(self)
        targets = {
            "--csv": self.csv,
            "--plot": self.plot,
            "--plot, second picture": self.window_plot,
            "--trace": self.trace,
        }
        histories = map(self.history_of, with_baselines(self.configurations()))
        for option, path in (*targets.items(), *(("--memory-history", h) for h in histories)):
            if path is not None:
                check_target(option, path, force=self.force)
        if self.plot is not None:
            if self.plot.suffix.lower() not in (".png", ".svg"):
                raise ArgumentError(f"--plot {self.plot} must end in .png or .svg")
            pyplot()
        if self.memory_history is not None and find_device(self.device).type != "cuda":
            raise ArgumentError(
                f"--memory-history {self.memory_history} needs --device cuda: PyTorch keeps a "
                "history of CUDA's allocator only; --trace FILE.json works on every device"
            )

    @property
    def window_plot(self) -> Path | None:
        """File for the second picture, of memory within windows: beside the first."""
        return self.plot and self.plot.with_stem(f"{self.plot.stem}-windows")

    def history_of(self, row: Configuration) -> Path | None:
        """File for PyTorch's memory history of a row, None where none is wanted."""
        if self.memory_history is None:
            return None
        parts = [self.memory_history.stem, row.strategy_name.replace(":", "-"), row.k1, row.k2]
        parts += [] if row.budget_bytes is None else [row.budget_bytes]
        return self.memory_history.with_stem("-".join(map(str, parts)))

    def configurations(self) -> list[Configuration]:
        """The rows asked for, in order."""
        return combinations(
            self.k1,
            self.k2,
            self.strategy,
            self.budget or (None,),
            overlap=self.overlap,
            executor=self.executor,
            time_batching=_TIME_BATCHING[self.time_batching],
        )
