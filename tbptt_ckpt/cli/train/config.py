"""What `tbptt-ckpt train` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tbptt_ckpt.arguments import check_above_zero, check_positive_int
from tbptt_ckpt.cli import options
from tbptt_ckpt.cli.model_options import ModelOptions
from tbptt_ckpt.errors import ArgumentError

_LARGEST_SEED = 2**63 - 1
_LARGEST_LR = 1_000.0  # Adam moves every weight by about this much at once
_REACH = 16  # of audits, in k1
_STRATEGY = "uniform:32"  # depends on nothing measured


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig(ModelOptions):
    """Options of `tbptt-ckpt train`; the defaults take about a minute on two cores."""

    k1: Annotated[int, "Steps between updates.", check_positive_int] = 64
    k2: Annotated[
        int | Literal["auto"] | None,
        "Steps an update reaches back; none: to the start; auto: as audits say.",
        options.Read(options.parse_reach),
        options.check_reach,
    ] = 128
    max_k2: Annotated[
        int | None,
        "Under --k2 auto, how far back audits reach.",
        check_positive_int,
        options.Default("16 times --k1"),
    ] = None
    k2_tolerance: Annotated[
        float | None,
        "Under --k2 auto, how large the mean of what is cut off may be, of the mean gradient.",
        check_above_zero,
        options.Default("0.1"),
    ] = None
    strategy: Annotated[
        str,
        "auto, optimal, retain, sqrt, step, uniform:LENGTH or revolve:STATES.",
        options.check_strategy,
        options.Default(f"{_STRATEGY}; optimal with --budget"),
    ] = ""
    budget: Annotated[
        str | None,
        "Peak of tensor memory: 200MiB, 8G, or a part of what is free: 0.5, 50%.",
        options.check_budget,
        options.Default("none"),
    ] = None
    overlap: Annotated[options.Overlap, "What later windows start from."] = "refresh"
    truncation: Annotated[
        str,
        "fixed; roulette or roulette:P stops a gradient by lot.",
        options.check_truncation,
    ] = "fixed"
    executor: Annotated[options.ExecutorName, "What runs a schedule."] = "replay"
    compile: Annotated[
        str,
        "false, true, auto, or a backend of torch.compile: steps in compiled blocks.",
        options.check_compile,
    ] = "false"
    lr: Annotated[float, "Learning rate of Adam."] = 4e-3
    max_steps: Annotated[int, "Time steps per lane, in total.", check_positive_int] = 48_000
    seed: Annotated[int, "Seed of the random numbers."] = 0
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
        options.TEXTS,
        options.Default("nothing"),
    ] = ()
    tensorboard: Annotated[Path | None, "Directory for TensorBoard's event files."] = None

    def __post_init__(self) -> None:
        if self.k2 == "auto" and self.max_k2 is None:
            object.__setattr__(self, "max_k2", _REACH * self.k1)
        if not self.strategy:
            object.__setattr__(self, "strategy", "optimal" if self.budget else _STRATEGY)

    def check(self) -> None:
        """Raise `ArgumentError` for options that cannot work, before anything is started."""
        super(TrainingConfig, self).check()  # slots make the class anew
        if not 0 < self.lr <= _LARGEST_LR:
            raise ArgumentError(f"--lr {self.lr} must be above 0 and at most {_LARGEST_LR}")
        if not 0 <= self.seed <= _LARGEST_SEED:
            raise ArgumentError(f"--seed {self.seed} must be in 0 to {_LARGEST_SEED}")
        if self.k2 != "auto":
            self.refuse(("max_k2", "k2_tolerance"), f"--k2 {self.k2} is fixed; --k2 auto has it")
        self.check_stored(self.executor)
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
        from tbptt_ckpt.cli.files import check_target

        # Whether a file that is there is of the run to resume is known once that is loaded.
        check_target("--save", self.save, force=self.force or self.resume)
        replaced = self.save if self.save.exists() else None
        if replaced and self.data and self.data.exists() and replaced.samefile(self.data):
            raise ArgumentError(f"--save {self.save} would replace the text of --data")
