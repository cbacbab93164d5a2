"""What a profile is asked to measure."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path

from tbptt_ckpt.cli.devices import DTYPES, find_device
from tbptt_ckpt.cli.files import check_target
from tbptt_ckpt.cli.options import check_choice, check_strategy
from tbptt_ckpt.cli.profile.workload import ByteWorkload
from tbptt_ckpt.errors import ArgumentError, check_positive_int
from tbptt_ckpt.profiling.configuration import Configuration
from tbptt_ckpt.profiling.plots import check_plots
from tbptt_ckpt.profiling.sweep import with_baselines

# Those whose schedule follows from the arguments alone, so that their peaks repeat to the byte.
# What `auto` chooses depends on measured times.
STRATEGIES = ("step", "uniform:32", "sqrt", "revolve:20")

_TIME_BATCHING: dict[str, bool | str] = {"auto": "auto", "true": True, "false": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileConfig:
    """Options of `tbptt-ckpt profile`; the defaults take some minute on two cores.

    Attributes:
        data: File to read; None takes the standard library's source text.
        model: As for `tbptt-ckpt train`.
        hidden: Width of the recurrent layers.
        layers: Number of recurrent layers.
        lanes: Parallel streams.
        k1: Steps between updates, one or several.
        k2: Steps an update reaches back, one or several.
        strategies: How windows are recomputed.
        budgets: Memory budgets in bytes; none measures without.
        overlap: `refresh` or `stale`.
        executor: `replay` or `checkpoint`.
        time_batching: `auto`, `true` or `false`.
        device: Where to run; None takes the accelerator there is, or else the CPU.
        dtype: As for `tbptt-ckpt train`.
        repeats: Windows to time for each row.
        csv: File for the rows.
        plot: File for the pictures.
        trace: File for the windows in time.
        memory_history: File for PyTorch's memory history.
        force: Whether files may be replaced.
    """

    data: Path | None = None
    model: str = "lstm"
    hidden: int = 192
    layers: int = 1
    lanes: int = 32
    k1: tuple[int, ...] = (64,)
    k2: tuple[int, ...] = (512,)
    strategies: tuple[str, ...] = STRATEGIES
    budgets: tuple[int, ...] = ()
    overlap: str = "refresh"
    executor: str = "replay"
    time_batching: str = "auto"
    device: str | None = None
    dtype: str = "float32"
    repeats: int = 5
    csv: Path | None = None
    plot: Path | None = None
    trace: Path | None = None
    memory_history: Path | None = None
    force: bool = False

    def check(self) -> None:
        """Raise `ArgumentError` for options that cannot work, before anything is started."""
        for name in ("hidden", "layers", "lanes", "repeats"):
            check_positive_int(f"--{name}", getattr(self, name))
        for name in ("k1", "k2"):
            for steps in getattr(self, name):
                check_positive_int(f"--{name}", steps)
        for strategy in self.strategies:
            check_strategy(strategy)
        check_choice("--overlap", self.overlap, ("refresh", "stale"))
        check_choice("--executor", self.executor, ("replay", "checkpoint"))
        check_choice("--time-batching", self.time_batching, tuple(_TIME_BATCHING))
        check_choice("--dtype", self.dtype, tuple(DTYPES))
        for option, path in self._targets():
            check_target(option, path, force=self.force)
        self._check_plot()
        self._check_memory_history()

    @property
    def window_plot(self) -> Path | None:
        """File for the second picture, of memory within windows: beside the first."""
        return self.plot and self.plot.with_stem(f"{self.plot.stem}-windows")

    @property
    def wants_traces(self) -> bool:
        """Whether windows in time are wanted."""
        return self.plot is not None or self.trace is not None

    def history_of(self, row: Configuration) -> Path | None:
        """File for PyTorch's memory history of a row, None where none is wanted."""
        if self.memory_history is None:
            return None
        parts = [self.memory_history.stem, row.strategy_name.replace(":", "-"), row.k1, row.k2]
        parts += [] if row.budget_bytes is None else [row.budget_bytes]
        return self.memory_history.with_stem("-".join(map(str, parts)))

    def _targets(self) -> list[tuple[str, Path]]:
        named = {
            "--csv": self.csv,
            "--plot": self.plot,
            "--plot, second picture": self.window_plot,
            "--trace": self.trace,
        }
        single = [(option, path) for option, path in named.items() if path is not None]
        histories = map(self.history_of, with_baselines(self.configurations()))
        return single + [("--memory-history", path) for path in histories if path is not None]

    def _check_plot(self) -> None:
        if self.plot is None:
            return
        if self.plot.suffix.lower() not in (".png", ".svg"):
            raise ArgumentError(f"--plot {self.plot} must end in .png or .svg")
        check_plots()

    def _check_memory_history(self) -> None:
        if self.memory_history is not None and find_device(self.device).type != "cuda":
            raise ArgumentError(
                f"--memory-history {self.memory_history} needs --device cuda: PyTorch keeps a "
                "history of CUDA's allocator only; --trace FILE.json works on every device"
            )

    def configurations(self) -> list[Configuration]:
        """The rows asked for, in order."""
        budgets = self.budgets or (None,)
        return [
            Configuration(
                strategy=strategy,
                k1=k1,
                k2=k2,
                overlap=self.overlap,
                executor=self.executor,
                time_batching=_TIME_BATCHING[self.time_batching],
                budget_bytes=budget,
            )
            for k1, k2, strategy, budget in product(self.k1, self.k2, self.strategies, budgets)
        ]

    def workload(self) -> ByteWorkload:
        """What is measured."""
        return ByteWorkload(
            model=self.model,
            data=self.data,
            hidden=self.hidden,
            layers=self.layers,
            lanes=self.lanes,
            device=str(find_device(self.device)),
            dtype=self.dtype,
        )
