"""How far a trainer has come."""

from __future__ import annotations

from dataclasses import dataclass

from tbptt_ckpt.engine.results import WindowResult


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TrainerResult:
    """What a trainer did, all its processes together.

    Attributes:
        steps: Steps trained.
        epochs: Passes completed.
        windows: Windows run or skipped.
        updates: Updates of the weights.
        loss: Loss of the last window that had one.
        recomputed_steps: Module steps run beyond one run of each new step.
        mean_drift: Mean over the windows of the relative change of recorded states when they are
            recomputed.
        seconds: Time spent in this process.
    """

    steps: int
    epochs: int
    windows: int
    updates: int
    loss: float | None
    recomputed_steps: int
    mean_drift: float
    seconds: float


@dataclass(slots=True)
class Progress:
    """What has been counted so far; the present pass counts its steps itself."""

    epoch: int = 0
    steps_before: int = 0  # of the passes before this one
    windows: int = 0
    updates: int = 0
    loss: float | None = None
    recomputed_steps: int = 0
    drift: float = 0.0  # summed
    cut_at: int = -1  # steps at which `max_steps` cut the last window short

    def add(self, window: WindowResult) -> None:
        """Count what a window did."""
        self.recomputed_steps += window.recomputed_steps
        self.drift += window.drift
        self.updates += window.updated
        if window.loss is not None:
            self.loss = float(window.loss)

    def result(self, steps: int, seconds: float) -> TrainerResult:
        """The same for the user."""
        return TrainerResult(
            steps=steps,
            epochs=self.epoch,
            windows=self.windows,
            updates=self.updates,
            loss=self.loss,
            recomputed_steps=self.recomputed_steps,
            mean_drift=self.drift / max(1, self.windows),
            seconds=seconds,
        )
