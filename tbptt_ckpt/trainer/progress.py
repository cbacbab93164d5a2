"""How far a trainer has come."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from tbptt_ckpt.engine.results import WindowResult, highest


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TrainerResult:
    """What a trainer did, all its processes together.

    Attributes:
        last_loss: Loss of the last window that had one.
        best_loss: The lowest loss that a validation found; None without one.
        best_steps: Steps that had been trained then.
        num_steps: Steps trained.
        num_windows: Windows run or skipped.
        num_updates: Updates of the weights.
        num_epochs: Passes completed.
        recomputed_steps: Module steps run beyond one run of each new step.
        mean_drift: Mean over the windows of the relative change of recorded states when they are
            recomputed.
        peak_bytes: Largest peak of windows since `seconds` count, in bytes; None if not measured.
        seconds: Time since training began or went on in this process.
        tokens_per_second: Valid steps of all lanes per second of these.
    """

    last_loss: float | None
    best_loss: float | None
    best_steps: int | None
    num_steps: int
    num_windows: int
    num_updates: int
    num_epochs: int
    recomputed_steps: int
    mean_drift: float
    peak_bytes: int | None
    seconds: float
    tokens_per_second: float


@dataclass(slots=True)
class Session:
    """What a process has done since it began to train; no part of snapshots."""

    num_tokens: int = 0
    peak_bytes: int | None = None
    begun: float = field(default_factory=time.perf_counter)

    def add(self, result: WindowResult) -> None:
        """Count a window."""
        self.num_tokens += result.num_tokens
        self.peak_bytes = highest(self.peak_bytes, result.peak_bytes)


@dataclass(slots=True)
class Progress:
    """What has been counted so far, named as in snapshots; the present run counts its steps."""

    epoch: int = 0
    sequence: int = 0  # of this pass: where the source is one sequence there is but one
    steps_before: int = 0  # of the sequences before this one
    windows: int = 0
    updates: int = 0
    loss: float | None = None
    recomputed_steps: int = 0
    drift: float = 0.0  # summed

    def add(self, result: WindowResult | None) -> None:
        """Count a window; None for one that was skipped."""
        self.windows += 1
        if result is not None:
            self.recomputed_steps += result.recomputed_steps
            self.drift += result.drift
            self.updates += result.updated
            self.loss = self.loss if result.loss_value is None else result.loss_value

    @property
    def place(self) -> tuple[int, int, int]:
        """Which sequence of which pass it is, and the steps before it."""
        return self.epoch, self.sequence, self.steps_before

    def end_sequence(self, steps: int) -> None:
        """Count a sequence, after which that many steps are trained in total."""
        self.sequence, self.steps_before = self.sequence + 1, steps

    def end_pass(self) -> None:
        """Count a pass."""
        self.epoch, self.sequence = self.epoch + 1, 0

    def result(
        self, steps: int, session: Session, best_loss: float | None, best_steps: int | None
    ) -> TrainerResult:
        """The same for the user."""
        seconds = time.perf_counter() - session.begun
        return TrainerResult(
            last_loss=self.loss,
            best_loss=best_loss,
            best_steps=best_steps,
            num_steps=steps,
            num_windows=self.windows,
            num_updates=self.updates,
            num_epochs=self.epoch,
            recomputed_steps=self.recomputed_steps,
            mean_drift=self.drift / max(1, self.windows),
            peak_bytes=session.peak_bytes,
            seconds=seconds,
            tokens_per_second=session.num_tokens / seconds,
        )


def out_of(count: int, total: int | None, what: str) -> str:
    """How many of them, in words."""
    return f"{count:,} {what}" if total is None else f"{count:,} of {total:,} {what}"
