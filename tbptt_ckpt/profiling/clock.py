"""A clock that stands still while the meter reads its records."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager


class PausedClock:
    """Seconds since it was made, pauses left out."""

    def __init__(self) -> None:
        self._begun = time.time()  # the clock of the meter's events
        self._starts: list[float] = []
        self._totals: list[float] = [0.0]

    def now(self) -> float:
        """Seconds of work so far."""
        return time.time() - self._begun - self._totals[-1]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stand still while the context is open."""
        start = time.time()
        try:
            yield
        finally:
            self._starts.append(start - self._begun)
            self._totals.append(self._totals[-1] + time.time() - start)

    def without_pauses(self, seconds: float) -> float:
        """Seconds since the clock was made as seconds of work."""
        before = bisect_right(self._starts, seconds)
        if before == 0:
            return seconds
        pause = self._totals[before] - self._totals[before - 1]
        inside = min(pause, seconds - self._starts[before - 1])
        return seconds - self._totals[before - 1] - inside
