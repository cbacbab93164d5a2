"""Short windows: the fastest nesting of all, by dynamic programming over every split."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from tbptt_ckpt.costs import Costs
from tbptt_ckpt.nesting import Nesting, NestingBuilder
from tbptt_ckpt.planner.leaves import LeafRoom

SHORT_STEPS = 64

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
    """The fastest segments of up to `SHORT_STEPS` steps that start at every depth.

    Args:
        free_bytes: For the states and one leaf.
        costs: What steps take.
        is_last: Whether the window ends with the segment.
    """

    def __init__(self, free_bytes: int, costs: Costs, *, is_last: bool) -> None:
        room = LeafRoom(SHORT_STEPS, free_bytes, costs, is_last, SHORT_STEPS)
        lengths = range(SHORT_STEPS + 1)
        self._leaf = np.array([costs.leaf_seconds(steps) for steps in lengths])
        self._advance = np.array([costs.advance_seconds(steps) for steps in lengths])
        longest = room.lengths(SHORT_STEPS)
        self._inner = self._segments(longest, None)
        self._ending = self._inner
        if is_last:
            deepest = int(min(room.deepest_last, len(longest), SHORT_STEPS - 1))
            self._ending = self._segments(
                [room.last(depth) for depth in range(deepest + 1)], self._inner.seconds
            )

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
        seconds = np.full((depths + 1, SHORT_STEPS + 1), np.inf)
        lefts = np.zeros((depths + 1, SHORT_STEPS + 1), np.int64)
        parts = seconds
        if inner is not None:
            parts = np.full_like(seconds, np.inf)
            parts[: len(inner)] = inner[: depths + 1]
        limits = np.array(longest)
        for steps in range(1, SHORT_STEPS + 1):
            best = np.where(limits >= steps, self._leaf[steps], np.inf)
            if steps > 1:
                splits = self._advance[1:steps] + parts[:-1, 1:steps]
                splits = splits + seconds[1:, steps - 1 : 0 : -1]
                shortest = splits.argmin(axis=1)
                split = splits[np.arange(depths), shortest]
                lefts[:-1, steps] = np.where(split < best, shortest + 1, 0)
                best = np.minimum(best, split)
            seconds[:-1, steps] = best
        return _Segments(seconds, lefts)


@lru_cache(maxsize=64)
def short_table(free_bytes: int, costs: Costs, *, is_last: bool) -> ShortTable:
    """The table, made once for windows of all short lengths."""
    return ShortTable(free_bytes, costs, is_last=is_last)
