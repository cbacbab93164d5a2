"""What a training run is asked to do: the options of `tbptt-ckpt train`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tbptt_ckpt.budget.amount import parse_budget
from tbptt_ckpt.cli import options
from tbptt_ckpt.cli.files import check_target
from tbptt_ckpt.errors import ArgumentError, check_positive_int

_LARGEST_SEED = 2**63 - 1
_LARGEST_LR = 1_000.0  # Adam moves every weight by about this much at once
_STRATEGY = "uniform:32"  # depends on nothing measured


def parse_reach(option: str, text: str) -> int | None:
    """A number of steps, or None for `none`."""
    if text.lower() == "none":
        return None
    try:
        return int(text)
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
        float | None, "Minutes between snapshots.", options.Default("none")
    ] = None
    keep: Annotated[int, "Snapshots that stay, the newest.", check_positive_int] = 3
    resume: Annotated[bool, "Go on from the newest valid snapshot, if there is one."] = False

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

    def identity(self) -> dict[str, object]:
        """What a resumed run must have in common with the one that was saved."""
        names = ("model", "hidden", "layers", "lanes", "lr", "seed", "dtype")
        data = None if self.data is None else str(self.data.resolve())
        return {"data": data, **{name: getattr(self, name) for name in names}}

    def _check_snapshots(self) -> None:
        needy = {
            "--snapshot-every": self.snapshot_every,
            "--snapshot-minutes": self.snapshot_minutes,
            "--resume": self.resume or None,
        }
        for option, value in needy.items():
            if value is not None and self.snapshot_dir is None:
                raise ArgumentError(f"{option} needs --snapshot-dir")
        if self.snapshot_minutes is not None and not self.snapshot_minutes > 0:
            raise ArgumentError(f"--snapshot-minutes {self.snapshot_minutes} must be above 0")

    def _check_save(self) -> None:
        if self.save is None:
            return
        check_target("--save", self.save, force=self.force)
        replaced = self.save if self.save.exists() else None
        if replaced and self.data and self.data.exists() and replaced.samefile(self.data):
            raise ArgumentError(f"--save {self.save} would replace the text of --data")
