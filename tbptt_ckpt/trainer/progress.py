"""How far a trainer has come."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TrainerResult:
    """What a trainer did, all its processes together.

    Attributes:
        steps: Steps trained.
        epochs: Passes completed.
        windows: Windows run or skipped.
        updates: Updates of the weights.
        loss: Loss of the last window that had one.
        seconds: Time spent in this process.
    """

    steps: int
    epochs: int
    windows: int
    updates: int
    loss: float | None
    seconds: float


@dataclass(slots=True)
class Progress:
    """What has been counted so far; the present pass counts its steps itself."""

    epoch: int = 0
    steps_before: int = 0  # of the passes before this one
    windows: int = 0
    updates: int = 0
    loss: float | None = None
    cut_at: int = -1  # steps at which `max_steps` cut the last window short

    def result(self, steps: int, seconds: float) -> TrainerResult:
        """The same for the user."""
        return TrainerResult(
            steps=steps,
            epochs=self.epoch,
            windows=self.windows,
            updates=self.updates,
            loss=self.loss,
            seconds=seconds,
        )
