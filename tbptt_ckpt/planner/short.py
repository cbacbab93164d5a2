"""Short windows: the fastest nesting of all, by dynamic programming over every split.

Leaves with losses, without, and with both are told apart; but in a part with both that is run
again and split once more, every step counts as one with a loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from tbptt_ckpt.planner.feasibility import Stretch
from tbptt_ckpt.schedule.costs import Costs
from tbptt_ckpt.schedule.nesting import Nesting, NestingBuilder

SHORT_STEPS = 256
_SIZES = (64, 128, SHORT_STEPS)

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Segments:
    """The fastest segments by depth and steps."""

    seconds: Floats  # their times; infinity where none fits. One depth more than fits anything
    parts: Floats  # the same where such a segment is advanced first, to be run again
    lefts: NDArray[np.int64]  # steps of the left part where they are split, 0 where they are leaves


class ShortTable:
    """The fastest segments of up to `most` steps that start at every depth."""

    def __init__(
        self, most: int, free_bytes: int, costs: Costs, num_losses: int, is_last: bool
    ) -> None:
        self._most, self._costs, self._num_losses = most, costs, num_losses
        self._leaf = np.array([costs.leaf_seconds(steps) for steps in range(most + 1)])
        self._advance = np.array([costs.advance_seconds(steps) for steps in range(most + 1)])
        least = min(
            costs.leaf_peak(1, losses, is_last=last) for losses in (0, 1) for last in (False, True)
        )
        depths = most
        if costs.kept_state_bytes:
            depths = max(1, min(most, 1 + (free_bytes - least) // costs.kept_state_bytes))
        self._free_bytes = free_bytes - np.arange(depths) * costs.kept_state_bytes
        self._both_bytes = _bytes_with_both(most, num_losses, costs)
        self._inner = {
            has_losses: self._segments(has_losses)
            for has_losses in (False, True)
            if (num_losses > 0 if has_losses else num_losses < most)
        }
        self._ending = self._segments(None) if is_last else self._inner[num_losses > 0]

    def seconds(self, steps: int) -> float:
        """Time of the fastest nesting of a stretch; infinity where none fits."""
        return float(self._ending.seconds[0, steps])

    def nesting(self, steps: int) -> Nesting | None:
        """The fastest nesting of a stretch, None where none fits."""
        if np.isinf(self._ending.seconds[0, steps]):
            return None
        builder = NestingBuilder()
        return builder.build(self._node(builder, self._ending, 0, steps))

    def _node(self, builder: NestingBuilder, segments: _Segments, depth: int, steps: int) -> int:
        left = int(segments.lefts[depth, steps])
        if not left:
            return builder.leaf(steps)
        head = self._head(builder, segments, depth, left, steps - self._num_losses)
        tail = self._node(builder, segments, depth + 1, steps - left)
        return builder.split(head, 1, tail)

    def _head(
        self, builder: NestingBuilder, segments: _Segments, depth: int, steps: int, without: int
    ) -> int:
        """The left part of a split; losses begin `without` steps after its start."""
        inner, both = segments, np.inf
        if segments is self._ending:
            inner = self._inner.get(steps > without, segments)
            if 0 < without < steps:
                both = self._leaves_with_both(without, steps)[depth, -1]
        if both <= inner.parts[depth, steps]:
            return builder.leaf(steps)
        return self._node(builder, inner, depth, steps)

    def _segments(self, has_losses: bool | None) -> _Segments:
        """All lengths in order, each at all depths at once; None for those that end the window."""
        depths, most = len(self._free_bytes), self._most
        seconds = np.full((depths + 1, most + 1), np.inf)
        parts = np.full_like(seconds, np.inf)
        lefts = np.zeros((depths + 1, most + 1), np.int64)
        # Even in calls of one step, an advance needs room beside the states kept so far.
        advance_bytes = self._costs.advance_peak(1, int(has_losses or 0), 1)
        may_advance = advance_bytes <= self._free_bytes
        for steps in range(1, most + 1):
            fits = self._leaf_bytes(steps, has_losses) <= self._free_bytes
            best = np.where(fits, self._leaf[steps], np.inf)
            if steps > 1:
                before = parts[:-1, 1:steps] if has_losses is not None else self._before(steps)
                splits = self._advance[1:steps] + before + seconds[1:, steps - 1 : 0 : -1]
                shortest = splits.argmin(axis=1)
                split = splits[np.arange(depths), shortest]
                lefts[:-1, steps] = np.where(split < best, shortest + 1, 0)
                best = np.minimum(best, split)
            seconds[:-1, steps] = best
            parts[:-1, steps] = np.where(may_advance, best, np.inf)
        return _Segments(seconds, parts, lefts)

    def _before(self, steps: int) -> Floats:
        """Times of left parts of every length: those that end where losses begin have none."""
        without = max(0, steps - self._num_losses)
        quiet, loud = self._inner.get(False), self._inner.get(True)
        if quiet is None or loud is None:
            return self._inner[loud is not None].parts[:-1, 1:steps]
        without = min(without, steps - 1)
        again = loud.parts[:-1, without + 1 : steps]
        if without and again.shape[1]:
            again = np.minimum(again, self._leaves_with_both(without, steps - 1))
        return np.hstack([quiet.parts[:-1, 1 : without + 1], again])

    def _leaves_with_both(self, without: int, most: int) -> Floats:
        """Times by depth of leaves that losses begin `without` steps into, up to `most` steps."""
        num_longer = most - without
        fits = self._both_bytes[without, 1 : num_longer + 1] <= self._free_bytes[:, None]
        advances = self._costs.advance_peak(1, 1, 1) <= self._free_bytes[:, None]
        return np.where(fits & advances, self._leaf[without + 1 : most + 1], np.inf)

    def _leaf_bytes(self, steps: int, has_losses: bool | None) -> int:
        if has_losses is None:
            num_losses = min(steps, self._num_losses)
            return self._costs.leaf_peak(steps, num_losses, is_last=True)
        return self._costs.leaf_peak(steps, steps * has_losses)


@lru_cache(maxsize=8)
def _bytes_with_both(most: int, num_losses: int, costs: Costs) -> NDArray[np.int64]:
    """Peaks of leaves by their steps without a loss and with one."""
    peaks = np.zeros((most - num_losses + 1, num_losses + 1), np.int64)
    for without in range(1, most - num_losses + 1):
        for losses in range(1, num_losses + 1):
            peaks[without, losses] = costs.leaf_peak(without + losses, losses)
    return peaks


def short_table(stretch: Stretch, free_bytes: int, costs: Costs) -> ShortTable:
    """The table of a stretch of at most `SHORT_STEPS` steps, made once for all lengths."""
    most = next(size for size in _SIZES if size >= stretch.steps)
    num_losses = stretch.num_losses
    is_cut = 0 < num_losses < stretch.steps
    if costs.quiet is None or num_losses == stretch.steps or (is_cut and not stretch.is_last):
        num_losses = most
    return _short_table(most, free_bytes, costs, num_losses, stretch.is_last)


_short_table = lru_cache(maxsize=64)(ShortTable)
