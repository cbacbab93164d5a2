"""What a window and a whole run give back."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from tbptt_ckpt.executor.window_loss import WindowLoss
from tbptt_ckpt.schedule.plan import Plan
from tbptt_ckpt.schedule.windows import Window


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class WindowResult:
    """One window, after its update.

    Attributes:
        index: Number of the window, from 0.
        start: First step that the gradient reaches.
        new_start: First step that no window before has run.
        stop: End of the window.
        loss: What was differentiated: a detached tensor without dimensions, or None where
            no step has a target.
        state: The detached state at `stop`.
        recomputed_steps: Module steps run beyond one run of each new step.
        peak_bytes: Peak of tensor memory in bytes; None if it was not measured.
        drift: Relative change of recorded states when they are recomputed with today's
            weights; 0.0 where no step of an earlier window runs again.
        seconds: Wall-clock time.
        plan: How it was run; None where nothing was differentiated.
        updated: Whether the weights were updated.
    """

    index: int
    start: int
    new_start: int
    stop: int
    loss: Tensor | None
    state: Any = field(repr=False)  # tensors would bury the rest
    recomputed_steps: int
    peak_bytes: int | None
    drift: float
    seconds: float
    plan: Plan | None = field(repr=False)
    updated: bool


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TrainResult:
    """A whole run.

    Attributes:
        loss: Summed loss over summed weight; None if no step had a target.
        state: The detached final state.
        num_steps: Steps of the sequence.
        num_windows: Windows.
        peak_bytes: Largest peak of its windows in bytes; None if not measured.
        seconds: Wall-clock time.
        tokens_per_second: Valid steps of all lanes per second.
    """

    loss: float | None
    state: Any = field(repr=False)
    num_steps: int
    num_windows: int
    peak_bytes: int | None
    seconds: float
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over the windows of a run."""

    loss_sum: float = 0.0
    weight: float = 0.0
    num_steps: int = 0
    num_windows: int = 0
    num_tokens: int = 0
    peak_bytes: int | None = None

    def plus(
        self, window: Window, loss: WindowLoss, num_tokens: int, peak_bytes: int | None
    ) -> Totals:
        """The sums with one more window, whose peak may not have been measured."""
        peaks = [peak for peak in (self.peak_bytes, peak_bytes) if peak is not None]
        return Totals(
            loss_sum=self.loss_sum + (loss.loss_sum or 0.0),
            weight=self.weight + float(loss.weight),
            num_steps=window.stop,
            num_windows=window.index + 1,
            num_tokens=self.num_tokens + num_tokens,
            peak_bytes=max(peaks, default=None),
        )

    def skipping(self, window: Window) -> Totals:
        """The sums where a window was left out."""
        return replace(self, num_steps=window.stop, num_windows=window.index + 1)

    def result(self, state: Any, seconds: float) -> TrainResult:
        """The run's result."""
        return TrainResult(
            loss=self.loss_sum / self.weight if self.weight else None,
            state=state,
            num_steps=self.num_steps,
            num_windows=self.num_windows,
            peak_bytes=self.peak_bytes,
            seconds=seconds,
            tokens_per_second=self.num_tokens / seconds,
        )
