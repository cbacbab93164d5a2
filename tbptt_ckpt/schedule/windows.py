"""Where windows lie: which steps each update touches, for every `(num_steps, k1, k2)`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

from tbptt_ckpt.arguments import PositiveInt, checked


@dataclass(frozen=True, slots=True)
class Window:
    """The steps of one update.

    All ranges are half-open. The new steps are `[new_start, stop)`; the gradient
    reaches back over `[start, stop)`.

    Attributes:
        index: Number of the window, from 0.
        start: First step the gradient reaches.
        new_start: First step no earlier window has run, the update point before.
        stop: The update point that ends the window.
        run_start: Where `truncation="roulette"` has stopped the gradient on its way to a state,
            the step of that state; None elsewhere.
    """

    index: int
    start: int
    new_start: int
    stop: int
    run_start: int | None = None

    @property
    def first(self) -> int:
        """First step that runs at all: with `k2 < k1`, new steps before `start` run too."""
        return min(self.start, self.new_start) if self.run_start is None else self.run_start

    @property
    def num_new_steps(self) -> int:
        """Steps no earlier window has run."""
        return self.stop - self.new_start


class WindowSequence(Sequence[Window]):
    """All windows of a sequence, made on demand."""

    def __init__(self, num_steps: int, k1: int, k2: int | None) -> None:
        self.num_steps, self.k1, self.k2 = num_steps, k1, k2

    def __len__(self) -> int:
        return -(-self.num_steps // self.k1)

    @overload
    def __getitem__(self, index: int) -> Window: ...
    @overload
    def __getitem__(self, index: slice) -> list[Window]: ...
    def __getitem__(self, index: int | slice) -> Window | list[Window]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = range(len(self))[index]  # bounds and negative indices as for any sequence
        return window_at(position, self.num_steps, self.k1, self.k2)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, WindowSequence):
            return NotImplemented
        return (self.num_steps, self.k1, self.k2) == (other.num_steps, other.k1, other.k2)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"WindowSequence(num_steps={self.num_steps}, k1={self.k1}, k2={self.k2})"


@checked
def tbptt_windows(
    num_steps: PositiveInt, k1: PositiveInt, k2: PositiveInt | None
) -> WindowSequence:
    """Windows of truncated BPTT over a sequence.

    Updates happen at `t_n = min(n * k1, num_steps)`; window n has the new steps
    `[t_{n-1}, t_n)` and reaches back to `max(0, t_n - k2)`. The last window may be
    short; nothing is dropped.

    Args:
        num_steps: Length of the sequence in steps.
        k1: Steps between updates.
        k2: Steps an update reaches back; None reaches back to the start.

    Raises:
        ArgumentError: A number that is not a positive integer.

    References:
        Williams & Peng (1990), doi:10.1162/neco.1990.2.4.490: BPTT(h; h') with
        h = k2 and h' = k1. Sutskever (2013), PhD thesis, section 2.8.6.
    """
    return WindowSequence(num_steps, k1, k2)


def window_at(index: int, num_steps: int | None, k1: int, k2: int | None) -> Window:
    """Window number `index`; `num_steps` None stands for a sequence that has not ended yet."""
    stop = update_point(index + 1, num_steps, k1)
    start = 0 if k2 is None else max(0, stop - k2)
    return Window(index, start, update_point(index, num_steps, k1), stop)


def update_point(count: int, num_steps: int | None, k1: int) -> int:
    """`t_n` for n = `count`."""
    point = count * k1
    return point if num_steps is None else min(point, num_steps)


def next_point(step: int, k1: int) -> int:
    """The first update point at or after a step, of a sequence that does not end before it."""
    return -(-step // k1) * k1


def later_starts(window: Window, num_steps: int | None, k1: int, k2: int | None) -> list[int]:
    """Steps inside `window`, in order, at which later windows will start; 0 is left out.

    Only a last, short window can start off the regular grid, and it is listed as
    soon as the length is known.
    """
    if k2 is None:
        return []
    # Each is k2 steps before an update point, of which the last may be off the grid.
    following, least = (window.index + 2) * k1, window.first + k2 + 1
    least = max(following, least + (following - least) % k1)
    most = window.stop + k2 if num_steps is None else min(window.stop + k2, num_steps - 1)
    starts = [point - k2 for point in range(least, most + 1, k1)]
    if num_steps is not None and window.first < num_steps - k2 <= window.stop < num_steps:
        starts.append(num_steps - k2)
    return starts


def points_after(step: int, stop: int, k1: int) -> range:
    """Update points between two steps, neither of them included."""
    return range(next_point(step + 1, k1), stop, k1)


def joint_steps(window: Window, k1: int) -> range:
    """Update points after a window's start, up to its new steps: stale blocks restart there."""
    return range((window.start // k1 + 1) * k1, window.new_start + 1, k1)


def recorded_steps(
    window: Window, num_steps: int | None, k1: int, k2: int | None, *, stale: bool
) -> list[int]:
    """Steps whose states earlier windows leave for it and later ones to start from; not step 0."""
    found = {window.start, window.new_start}
    if stale:
        found |= {*joint_steps(window, k1), *later_starts(window, num_steps, k1, k2)}
    return sorted(step for step in found if 0 < step <= window.new_start)


def noted_steps(
    window: Window, num_steps: int | None, k1: int, k2: int | None, *, stale: bool
) -> list[int]:
    """Steps inside a window, its end aside, whose states it leaves for later ones to start from."""
    found = {window_at(window.index + 1, num_steps, k1, k2).start}
    if stale:
        found |= {*later_starts(window, num_steps, k1, k2)}
    after = window.new_start if stale else window.first
    return sorted(step for step in found if after < step < window.stop)
