"""Compare two ways of doing the same work: interleaved in one process, warm, ratio by ratio.

A machine's speed drifts over minutes and differs between processes. Neighbouring runs share
both, so each pair gives one ratio, and the median of the ratios is the figure. Which of the
two runs first alternates, since the second finds other caches.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_RESAMPLES = 10_000


@dataclass(frozen=True)
class PairedTimes:
    """Seconds of both ways, pair by pair.

    Attributes:
        baseline: Seconds of the baseline.
        treated: Seconds of what is compared with it.
    """

    baseline: NDArray[np.float64]
    treated: NDArray[np.float64]

    @property
    def ratio(self) -> float:
        """Median over the pairs of treated over baseline."""
        return float(np.median(self.treated / self.baseline))

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the median ratio, from bootstrap resamples of the pairs."""
        ratios = self.treated / self.baseline
        generator = np.random.default_rng(0)
        chosen = generator.integers(0, len(ratios), (_RESAMPLES, len(ratios)))
        low, high = np.percentile(np.median(ratios[chosen], axis=1), [2.5, 97.5])
        return float(low), float(high)

    def seconds(self) -> dict[str, float]:
        """Median seconds of both."""
        return {
            "baseline s": float(np.median(self.baseline)),
            "treated s": float(np.median(self.treated)),
        }


def time_pairs(
    baseline: Callable[[], Any],
    treated: Callable[[], Any],
    num_pairs: int,
    num_warmups: int = 2,
    between: Callable[[], Any] = lambda: None,
) -> PairedTimes:
    """Time both in alternating order; the garbage collector runs between runs, never in one.

    `between` is called before each run, outside of its time.
    """
    for _ in range(num_warmups):
        for way in (baseline, treated):
            between()
            way()
    gc.collect()
    gc.freeze()  # what has been there before takes a collection 0.2 s each time
    ways = (baseline, treated)
    seconds: tuple[list[float], list[float]] = ([], [])
    for pair in range(num_pairs):
        for way in (0, 1) if pair % 2 == 0 else (1, 0):
            between()
            seconds[way].append(timed(ways[way]))
    gc.unfreeze()
    return PairedTimes(np.array(seconds[0]), np.array(seconds[1]))


def timed(work: Callable[[], Any]) -> float:
    gc.collect()
    gc.disable()
    try:
        begun = time.perf_counter()
        work()
        return time.perf_counter() - begun
    finally:
        gc.enable()
