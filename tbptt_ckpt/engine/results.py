"""What a window and a whole run give back."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from tbptt_ckpt.engine.reach import Decay, Reach
from tbptt_ckpt.engine.reach_rule import ChosenK2
from tbptt_ckpt.schedule.plan import Plan
from tbptt_ckpt.schedule.windows import Window


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowFigures(Window):
    """The numbers of one window, after its update.

    Attributes:
        recomputed_steps: Module steps run beyond one run of each new step.
        num_tokens: Valid new steps of all lanes, of all ranks that train together.
        peak_bytes: Peak of tensor memory in bytes; None if it was not measured.
        reserved_peak_bytes: Most that an accelerator's allocator had reserved meanwhile, for the
            whole process and with what it keeps for later; None on the CPU, or if not measured.
        drift: Relative change of recorded states when they are recomputed with today's
            weights; 0.0 where no step of an earlier window runs again.
        seconds: Wall-clock time.
        updated: Whether the weights were updated.
        survival: How probable it was that the gradient reached as far back as `start`; what it
            brings from there is divided by this. 1.0 where nothing was drawn.
        decay: How the gradient fades from the window's end to its start, in the windows in which
            that is measured: as many as take 1 % of the time, those of two leaves and more, and
            none under `executor="checkpoint"` or `truncation="roulette"`, or where weights are
            sharded; None in the others.
        reach: How many steps back make the gradient to 1e-3, from `decay`.
        chosen_k2: Under `k2="auto"`, how far back it was to reach, and what that misses; None
            elsewhere, and where nothing was differentiated.
        compile_seconds: What compiling its steps took before it, which is no part of `seconds`.
    """

    recomputed_steps: int
    num_tokens: int
    peak_bytes: int | None
    reserved_peak_bytes: int | None
    drift: float
    seconds: float
    updated: bool
    survival: float = 1.0
    decay: Decay | None = None
    reach: Reach | None = None
    chosen_k2: ChosenK2 | None = None
    compile_seconds: float = 0.0

    @property
    def executed_steps(self) -> int:
        """Module steps run."""
        return self.recomputed_steps + self.num_new_steps


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class WindowResult(WindowFigures):
    """One window, after its update; where there is no optimizer, gradients are in `.grad`.

    Attributes not named here are those of `WindowFigures` and `Window`.

    Attributes:
        loss: What was differentiated, over all ranks that train together: a detached tensor
            without dimensions, or None where no step has a target.
        loss_value: The same as a number, for which no device has to be waited for any more.
        state: The detached state at `stop`.
        init_state_grad: Of `run_window`: nested like the initial state, with the gradient of each
            of its tensors, or None where there is none.
        plan: How it was run; None where nothing was differentiated.
    """

    loss: Tensor | None
    loss_value: float | None
    state: Any = field(repr=False)  # tensors would bury the rest
    init_state_grad: Any = field(default=None, repr=False)
    plan: Plan | None = field(repr=False)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TrainResult:
    """A whole run.

    Attributes:
        loss: Summed loss over summed weight; None if no step had a target.
        state: The detached final state.
        num_steps: Steps of the sequence.
        num_windows: Windows.
        peak_bytes: Largest peak of its windows in bytes; None if not measured.
        peak_bytes_of_ranks: The same of every rank, by rank; None where this process trains alone.
        seconds: Wall-clock time.
        tokens_per_second: Valid steps of all lanes per second.
    """

    loss: float | None
    state: Any = field(repr=False)
    num_steps: int
    num_windows: int
    peak_bytes: int | None
    peak_bytes_of_ranks: tuple[int | None, ...] | None
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

    def plus(self, window: WindowFigures, loss_sum: float, weight: float) -> Totals:
        """The sums with one more window."""
        return Totals(
            loss_sum=self.loss_sum + loss_sum,
            weight=self.weight + weight,
            num_steps=window.stop,
            num_windows=window.index + 1,
            num_tokens=self.num_tokens + window.num_tokens,
            peak_bytes=highest(self.peak_bytes, window.peak_bytes),
        )

    def skipping(self, window: Window) -> Totals:
        """The sums where a window was left out."""
        return replace(self, num_steps=window.stop, num_windows=window.index + 1)

    def result(
        self, state: Any, seconds: float, peaks: tuple[int | None, ...] | None = None
    ) -> TrainResult:
        """The run's result; `peaks` are those of all ranks."""
        return TrainResult(
            loss=self.loss_sum / self.weight if self.weight else None,
            state=state,
            num_steps=self.num_steps,
            num_windows=self.num_windows,
            peak_bytes=self.peak_bytes,
            peak_bytes_of_ranks=peaks,
            seconds=seconds,
            tokens_per_second=self.num_tokens / seconds,
        )


def highest(*peaks: int | None) -> int | None:
    """The highest of peaks that were measured; None where none was."""
    return max((peak for peak in peaks if peak is not None), default=None)
