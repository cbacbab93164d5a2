"""What commands are asked for: the options of `train`, `plan` and `profile`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tbptt_ckpt.arguments import check_above_zero, check_positive_int, check_size
from tbptt_ckpt.budget.amount import parse_budget
from tbptt_ckpt.cli import options
from tbptt_ckpt.cli.devices import find_device
from tbptt_ckpt.cli.files import check_target
from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.profiling.configuration import Configuration, combinations
from tbptt_ckpt.profiling.plots import pyplot
from tbptt_ckpt.profiling.profile import DEFAULT_STRATEGIES
from tbptt_ckpt.profiling.sweep import with_baselines

_LARGEST_SEED = 2**63 - 1
_LARGEST_LR = 1_000.0  # Adam moves every weight by about this much at once
_STRATEGY = "uniform:32"  # depends on nothing measured


def parse_reach(option: str, text: str) -> int | None:
    """A number of steps, or None for `none`."""
    try:
        return None if text.lower() == "none" else int(text)
    except ValueError:
        raise ArgumentError(f"{option} {text} is neither a number of steps nor none") from None


def _check_reach(option: str, steps: int) -> None:
    check_positive_int(option, steps, "none (reach back to the start)")


def _check_budget(option: str, text: str) -> None:
    what = "neither a size such as 200MiB nor a fraction of the free memory such as 0.5"
    options.check_readable(option, text, parse_budget, what)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """Options of `tbptt-ckpt train`; the defaults take about a minute on two cores."""

    data: Annotated[
        Path | None, "File to learn, memory-mapped.", options.Default("the Python standard library")
    ] = None
    model: Annotated[str, "lstm, gru, rnn, lstmcell, or your own: package.module:factory."] = "lstm"
    hidden: options.Hidden = 192
    layers: options.Layers = 1
    lanes: options.Lanes = 32
    k1: Annotated[int, "Steps between updates.", check_positive_int] = 64
    k2: Annotated[
        int | None,
        "Steps an update reaches back; none: to the start.",
        options.Read(parse_reach),
        _check_reach,
    ] = 128
    strategy: Annotated[
        str,
        "auto, optimal, retain, sqrt, step, uniform:LENGTH or revolve:STATES.",
        options.check_strategy,
        options.Default(f"{_STRATEGY}; optimal with --budget"),
    ] = ""
    budget: Annotated[
        str | None,
        "Peak of tensor memory, such as 200MiB, or a fraction of what is free: 0.5.",
        _check_budget,
        options.Default("none"),
    ] = None
    overlap: options.Overlap = "refresh"
    executor: options.ExecutorName = "replay"
    lr: Annotated[float, "Learning rate of Adam."] = 4e-3
    max_steps: Annotated[int, "Time steps per lane, in total.", check_positive_int] = 48_000
    seed: Annotated[int, "Seed of the random numbers."] = 0
    device: options.Device = None
    dtype: options.Dtype = "float32"
    save: Annotated[Path | None, "Write the weights to this file."] = None
    force: Annotated[bool, "Let --save replace a file."] = False
    snapshot_dir: Annotated[Path | None, "Directory for snapshots of the training state."] = None
    snapshot_every: Annotated[
        int | None, "Time steps between snapshots.", check_positive_int, options.Default("none")
    ] = None
    snapshot_minutes: Annotated[
        float | None, "Minutes between snapshots.", check_above_zero, options.Default("none")
    ] = None
    keep: Annotated[int, "Snapshots that stay, the newest.", check_positive_int] = 3
    resume: Annotated[bool, "Go on from the newest valid snapshot, if there is one."] = False
    accept: Annotated[
        tuple[str, ...],
        "What may differ from the run to resume, such as lr,data.",
        options.read_list(lambda _, text: text),
        options.Default("nothing"),
    ] = ()

    def __post_init__(self) -> None:
        if not self.strategy:
            object.__setattr__(self, "strategy", "optimal" if self.budget else _STRATEGY)

    def check(self) -> None:
        """Raise `ArgumentError` for options that cannot work, before anything is started."""
        options.check_options(self)
        if not 0 < self.lr <= _LARGEST_LR:
            raise ArgumentError(f"--lr {self.lr} must be above 0 and at most {_LARGEST_LR}")
        if not 0 <= self.seed <= _LARGEST_SEED:
            raise ArgumentError(f"--seed {self.seed} must be in 0 to {_LARGEST_SEED}")
        self._check_save()
        self._check_snapshots()

    def _check_snapshots(self) -> None:
        needy = {
            "--snapshot-every": self.snapshot_every,
            "--snapshot-minutes": self.snapshot_minutes,
            "--resume": self.resume or None,
            "--accept": self.accept or None,
        }
        for option, value in needy.items():
            if value is not None and self.snapshot_dir is None:
                raise ArgumentError(f"{option} needs --snapshot-dir")

    def _check_save(self) -> None:
        if self.save is None:
            return
        # Whether a file that is there is of the run to resume is known once that is loaded.
        check_target("--save", self.save, force=self.force or self.resume)
        replaced = self.save if self.save.exists() else None
        if replaced and self.data and self.data.exists() and replaced.samefile(self.data):
            raise ArgumentError(f"--save {self.save} would replace the text of --data")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanningConfig:
    """Options of `tbptt-ckpt plan`; sizes in bytes."""

    steps: Annotated[int, "Steps a window reaches back (k2).", check_positive_int] = 1000
    budget: Annotated[
        int | None,
        "Peak of device memory, everything included, such as 512MiB.",
        options.SIZE,
        options.Default("no limit"),
    ] = None
    strategy: Annotated[str, "optimal, retain, sqrt, step, uniform:LENGTH or revolve:STATES."] = (
        "optimal"
    )
    model: Annotated[
        str | None,
        "Measure this: lstm, gru, rnn, lstmcell, or your own package.module:factory.",
        options.Default("lstm, unless costs are given"),
    ] = None
    hidden: options.Hidden = 192
    layers: options.Layers = 1
    lanes: options.Lanes = 32
    device: options.Device = None
    dtype: options.Dtype = "float32"
    costs: Annotated[Path | None, "Take the costs of this JSON file, as --json prints them."] = None
    state_bytes: Annotated[
        int | None, "One boundary state, by hand; with --step-bytes.", options.SIZE
    ] = None
    step_bytes: Annotated[
        int | None, "Each step of a leaf, by hand; with --state-bytes.", options.SIZE
    ] = None
    leaf_bytes: Annotated[int, "A leaf in addition, by hand.", options.SIZE] = 0
    fixed_bytes: Annotated[
        int, "Weights, gradients and all else that is there, by hand.", options.SIZE
    ] = 0
    step_seconds: Annotated[float, "Running one step without a graph, by hand.", check_size] = 1e-3
    call_seconds: Annotated[float, "Each call in addition, by hand.", check_size] = 0.0
    backward_ratio: Annotated[
        float, "Differentiating a step over running it, by hand.", check_size
    ] = 2.0

    def check(self) -> None:
        """Raise `ArgumentError` for options that cannot work, before anything is measured."""
        options.check_options(self)
        if (self.state_bytes is None) != (self.step_bytes is None):
            raise ArgumentError("--state-bytes and --step-bytes are given together or not at all")
        ways = {"--model": self.model, "--costs": self.costs, "--state-bytes": self.state_bytes}
        given = [option for option, value in ways.items() if value is not None]
        if len(given) > 1:
            raise ArgumentError(f"{' and '.join(given)} are different ways to say what steps take")


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
        rows = with_baselines(self.configurations())
        targets = [("--csv", self.csv), ("--plot", self.plot)]
        targets += [("--plot, second picture", self.window_plot), ("--trace", self.trace)]
        targets += [("--memory-history", self.history_of(row)) for row in rows]
        for option, path in targets:
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
        parts = (self.memory_history.stem, row.strategy_name.replace(":", "-"), row.k1, row.k2)
        known = (str(part) for part in (*parts, row.budget_bytes) if part is not None)
        return self.memory_history.with_stem("-".join(known))

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
