"""Short windows: the fastest nesting of all, by dynamic programming over every split."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from tbptt_ckpt.planner.leaves import LeafRoom
from tbptt_ckpt.schedule.costs import Costs
from tbptt_ckpt.schedule.nesting import Nesting, NestingBuilder

SHORT_STEPS = 256
_SIZES = (64, 128, SHORT_STEPS)

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Segments:
    """The fastest segments by depth and steps.

    Attributes:
        seconds: Their times; infinity where none fits. One depth more than fits anything.
        lefts: Steps of the left part where they are split, 0 where they are leaves.
    """

    seconds: Floats
    lefts: NDArray[np.int64]


class ShortTable:
    """The fastest segments of up to `most` steps that start at every depth.

    Args:
        most: Steps.
        free_bytes: For the states and one leaf.
        costs: What steps take.
        is_last: Whether the window ends with the segment.
    """

    def __init__(self, most: int, free_bytes: int, costs: Costs, *, is_last: bool) -> None:
        room = LeafRoom(most, free_bytes, costs, is_last, most)
        self._most, lengths = most, range(most + 1)
        self._leaf = np.array([costs.leaf_seconds(steps) for steps in lengths])
        self._advance = np.array([costs.advance_seconds(steps) for steps in lengths])
        # Even in calls of one step, an advance needs room beside the states kept so far.
        self._advance_room = free_bytes - costs.advance_bytes(1)
        self._state_bytes = costs.state_bytes
        longest = room.lengths(most)
        self._inner = self._segments(longest, None)
        self._ending = self._inner
        if is_last:
            deepest = int(min(room.deepest_last, len(longest), most - 1))
            self._ending = self._segments(
                [room.last(depth) for depth in range(deepest + 1)], self._inner.seconds
            )

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
        head = self._node(builder, self._inner, depth, left)
        tail = self._node(builder, segments, depth + 1, steps - left)
        return builder.split(head, 1, tail)

    def _segments(self, longest: list[int], inner: Floats | None) -> _Segments:
        """All lengths in order, each at all depths at once.

        Args:
            longest: Steps of the longest leaf that ends such a segment, by depth.
            inner: Times of left parts, where they are of another kind.
        """
        depths = len(longest)
        seconds = np.full((depths + 1, self._most + 1), np.inf)
        lefts = np.zeros((depths + 1, self._most + 1), np.int64)
        parts = seconds
        if inner is not None:
            parts = np.full_like(seconds, np.inf)
            parts[: len(inner)] = inner[: depths + 1]
        limits = np.array(longest)
        cannot_advance = np.arange(depths) * self._state_bytes > self._advance_room
        for steps in range(1, self._most + 1):
            best = np.where(limits >= steps, self._leaf[steps], np.inf)
            if steps > 1:
                splits = self._advance[1:steps] + parts[:-1, 1:steps]
                splits = splits + seconds[1:, steps - 1 : 0 : -1]
                splits[cannot_advance] = np.inf
                shortest = splits.argmin(axis=1)
                split = splits[np.arange(depths), shortest]
                lefts[:-1, steps] = np.where(split < best, shortest + 1, 0)
                best = np.minimum(best, split)
            seconds[:-1, steps] = best
        return _Segments(seconds, lefts)


def short_nesting(steps: int, free_bytes: int, costs: Costs, *, is_last: bool) -> Nesting | None:
    """The fastest nesting of at most `SHORT_STEPS` steps; None where none fits."""
    most = next(size for size in _SIZES if size >= steps)
    return _short_table(most, free_bytes, costs, is_last).nesting(steps)


def short_seconds(steps: int, free_bytes: int, costs: Costs, *, is_last: bool) -> float:
    """Time of the fastest nesting; infinity where none fits."""
    most = next(size for size in _SIZES if size >= steps)
    return _short_table(most, free_bytes, costs, is_last).seconds(steps)


@lru_cache(maxsize=64)
def _short_table(most: int, free_bytes: int, costs: Costs, is_last: bool) -> ShortTable:
    """The table, made once for all lengths."""
    return ShortTable(most, free_bytes, costs, is_last=is_last)
