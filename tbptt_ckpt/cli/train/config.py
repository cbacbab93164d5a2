"""What a training run is asked to do."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tbptt_ckpt.budget.amount import parse_budget
from tbptt_ckpt.cli.devices import DTYPES
from tbptt_ckpt.cli.files import check_target
from tbptt_ckpt.cli.options import check_choice, check_strategy
from tbptt_ckpt.errors import ArgumentError, check_positive_int

_LARGEST_SEED = 2**63 - 1
_LARGEST_LR = 1_000.0  # Adam moves every weight by about this much at once


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """Options of `tbptt-ckpt train`; the defaults take about a minute on two cores.

    Attributes:
        data: File to learn; None takes the standard library's source text.
        model: `lstm`, `gru`, `rnn`, `lstmcell`, or `package.module:factory`.
        hidden: Width of the recurrent layers.
        layers: Number of recurrent layers.
        lanes: Parallel streams.
        k1: Steps between updates.
        k2: Steps an update reaches back; None reaches back to the start of the pass.
        strategy: How windows are recomputed. The default depends on nothing measured.
        budget: Peak of tensor memory: a size, or a fraction of what is free; None for none.
        overlap: `refresh` or `stale`.
        executor: `replay` or `checkpoint`.
        lr: Learning rate of Adam.
        max_steps: Time steps per lane, in total.
        seed: Of the weights and of whatever the model draws.
        device: Where to run; None takes the accelerator there is, or else the CPU.
        dtype: `float32`, `float64`, or `bfloat16` for autocast over float32 weights.
        save: File for the weights.
        force: Whether `save` may replace a file.
        snapshot_dir: Directory for snapshots of the training state; None takes none.
        snapshot_every: Time steps between snapshots; None for none by steps.
        snapshot_minutes: Minutes between snapshots; None for none by time.
        keep: Snapshots that stay, the newest.
        resume: Go on from the newest valid snapshot, if there is one.
    """

    data: Path | None = None
    model: str = "lstm"
    hidden: int = 192
    layers: int = 1
    lanes: int = 32
    k1: int = 64
    k2: int | None = 128
    strategy: str = "uniform:32"
    budget: str | None = None
    overlap: str = "refresh"
    executor: str = "replay"
    lr: float = 4e-3
    max_steps: int = 48_000
    seed: int = 0
    device: str | None = None
    dtype: str = "float32"
    save: Path | None = None
    force: bool = False
    snapshot_dir: Path | None = None
    snapshot_every: int | None = None
    snapshot_minutes: float | None = None
    keep: int = 3
    resume: bool = False

    def check(self) -> None:
        """Raise `ArgumentError` for options that cannot work, before anything is started."""
        for name in ("hidden", "layers", "lanes", "k1", "max_steps"):
            check_positive_int(f"--{name.replace('_', '-')}", getattr(self, name))
        if self.k2 is not None:
            check_positive_int("--k2", self.k2, "none (reach back to the start)")
        if not 0 < self.lr <= _LARGEST_LR:
            raise ArgumentError(f"--lr {self.lr} must be above 0 and at most {_LARGEST_LR}")
        if not 0 <= self.seed <= _LARGEST_SEED:
            raise ArgumentError(f"--seed {self.seed} must be in 0 to {_LARGEST_SEED}")
        check_choice("--overlap", self.overlap, ("refresh", "stale"))
        check_choice("--executor", self.executor, ("replay", "checkpoint"))
        check_choice("--dtype", self.dtype, tuple(DTYPES))
        check_strategy(self.strategy)
        self.memory_budget()
        self._check_save()
        self._check_snapshots()

    def memory_budget(self) -> str | float | None:
        """The budget as `TBPTT` takes it.

        Raises:
            ArgumentError: Neither a size nor a fraction.
        """
        if self.budget is None:
            return None
        fraction = re.fullmatch(r"0?\.\d+|1\.0*", self.budget)
        given = float(self.budget) if fraction else self.budget
        try:
            parse_budget(given)
        except ArgumentError as error:
            raise ArgumentError(
                f"--budget {self.budget} is neither a size such as 200MiB nor a fraction of the "
                "free memory such as 0.5"
            ) from error
        return given

    def identity(self) -> dict[str, object]:
        """What a resumed run must have in common with the one that was saved."""
        names = ("model", "hidden", "layers", "lanes", "lr", "seed", "dtype")
        data = None if self.data is None else str(self.data.resolve())
        return {"data": data, **{name: getattr(self, name) for name in names}}

    def _check_snapshots(self) -> None:
        options = {
            "--snapshot-every": self.snapshot_every,
            "--snapshot-minutes": self.snapshot_minutes,
            "--resume": self.resume or None,
        }
        for option, value in options.items():
            if value is not None and self.snapshot_dir is None:
                raise ArgumentError(f"{option} needs --snapshot-dir")
        check_positive_int("--keep", self.keep)
        if self.snapshot_every is not None:
            check_positive_int("--snapshot-every", self.snapshot_every)
        if self.snapshot_minutes is not None and not self.snapshot_minutes > 0:
            raise ArgumentError(f"--snapshot-minutes {self.snapshot_minutes} must be above 0")

    def _check_save(self) -> None:
        if self.save is None:
            return
        check_target("--save", self.save, force=self.force)
        replaced = self.save if self.save.exists() else None
        if replaced and self.data and self.data.exists() and replaced.samefile(self.data):
            raise ArgumentError(f"--save {self.save} would replace the text of --data")
