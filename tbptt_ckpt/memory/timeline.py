"""Running live bytes of a region, their peak and a thinned record of them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_KEPT_POINTS = 4096


class LiveBytes:
    """Live bytes relative to the start of a region: now, and at the most so far."""

    def __init__(self) -> None:
        self.now_bytes = 0
        self.peak_bytes = 0
        self._lap_peak_bytes = 0
        self._seconds: NDArray[np.float64] = np.zeros(1)
        self._live: NDArray[np.int64] = np.zeros(1, np.int64)

    def fold(self, seconds: NDArray[np.float64], deltas: NDArray[np.int64]) -> None:
        """Add changes in the order they happened, `deltas` bytes at `seconds`."""
        if not deltas.size:
            return
        live = self.now_bytes + np.cumsum(deltas)
        self.now_bytes = int(live[-1])
        highest = int(live.max())
        self.peak_bytes = max(self.peak_bytes, highest)
        self._lap_peak_bytes = max(self._lap_peak_bytes, highest)
        self._append(*_thin(seconds, live))

    def take_lap(self) -> int:
        """The highest value since the last lap, the value it began with included."""
        peak, self._lap_peak_bytes = self._lap_peak_bytes, self.now_bytes
        return peak

    def close(self, seconds: float) -> None:
        """Record that nothing changes any more up to `seconds`."""
        self._append(np.array([seconds]), np.array([self.now_bytes]))

    def points(self) -> list[tuple[float, int]]:
        """(seconds, live bytes), thinned; the peak and both ends are always among them."""
        return list(zip(self._seconds.tolist(), self._live.tolist(), strict=True))

    def _append(self, seconds: NDArray[np.float64], live: NDArray[np.int64]) -> None:
        self._seconds = np.concatenate([self._seconds, seconds])
        self._live = np.concatenate([self._live, live])
        if self._live.size > 2 * _KEPT_POINTS:
            self._seconds, self._live = _thin(self._seconds, self._live)


def _thin(
    seconds: NDArray[np.float64], live: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """At most about `_KEPT_POINTS` of the points: highest and lowest of equal stretches.

    The highest point of all is the highest of its stretch, so it survives every thinning.
    """
    size = -(-live.size // (_KEPT_POINTS // 2))
    if size <= 2:
        return seconds, live
    stretches = np.pad(live, (0, -live.size % size), mode="edge").reshape(-1, size)
    starts = np.arange(len(stretches)) * size
    picks = np.concatenate([[0], starts + stretches.argmin(1), starts + stretches.argmax(1)])
    kept = np.union1d(np.minimum(picks, live.size - 1), live.size - 1)
    return seconds[kept], live[kept]
