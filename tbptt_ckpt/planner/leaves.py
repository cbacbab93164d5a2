"""How long a leaf may be beside a number of kept states, and rows of such leaves.

The symbols are those of the recursion: m bytes for states and one leaf, s bytes a state; a
leaf that starts d states deep has `m - d*s` bytes. Since that falls with d, leaves grow
towards the window's start.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from tbptt_ckpt.planner.feasibility import Way
from tbptt_ckpt.schedule.costs import Costs
from tbptt_ckpt.schedule.curves import Curve

_MOST_FULL = 1 << 14  # leaves looked at


@dataclass(frozen=True)
class LeafRoom:
    """What leaves of a stretch have to live in."""

    steps: int  # steps of the stretch; no leaf is longer
    bytes: int  # m
    way: Way  # how the stretch is planned
    longest: int  # no leaf is longer than this, whatever fits
    shortest: int = 1  # no leaf but the last is planned in less room than this many steps need
    # So many leaves are as long as fits all the same, those that start below the fewest states.
    # Where there are any, so is the last leaf.
    full: int = 0

    @property
    def costs(self) -> Costs:
        """What steps take."""
        return self.way.costs

    def leaf(self, depth: int) -> int:
        """Steps of the longest leaf that starts `depth` states deep, 0 if there is none."""
        steps = self._fitting(self.costs.leaf_bytes, depth)
        if depth >= self.full:
            steps = min(steps, self.longest)
        return steps if steps >= self.shortest else 0

    def last(self, depth: int) -> int:
        """The same for the leaf at the stretch's end."""
        steps = self._fitting(self.way.last_bytes, depth)
        if not self.full:
            steps = min(steps, max(self.longest, self.way.least_last))
        return steps if steps >= self.way.least_last else 0

    @cached_property
    def deepest_leaf(self) -> float:
        """The most states a leaf may start below; -1 where none fits at all."""
        below_advance = 1 + self._deepest(self.costs.advance_bytes, 1)
        return min(below_advance, self._deepest(self.costs.leaf_bytes, self.shortest))

    @cached_property
    def deepest_last(self) -> float:
        """The same for the leaf at the stretch's end."""
        below_advance = 1 + self._deepest(self.costs.advance_bytes, 1)
        deepest = self._deepest(self.way.last_bytes, self.way.least_last)
        return min(below_advance, 1 + self.deepest_leaf, deepest)

    def runs(self) -> Iterator[tuple[int, float, int]]:
        """(depth, depth after, steps) of equal longest leaves, from depth 0 on."""
        depth = 0
        while depth <= self.deepest_leaf and (steps := self.leaf(depth)):
            # An advance before the leaf may need more than the leaf.
            after = 1 + min(self._deepest(self.costs.leaf_bytes, steps), self.deepest_leaf)
            if depth < self.full:
                after = min(after, self.full)
            yield depth, after, steps
            if math.isinf(after):
                return
            depth = int(after)

    def lengths(self, most: int, enough: int = 1 << 62) -> list[int]:
        """The longest leaf at each depth, at most `most` of them, until they cover enough steps."""
        found: list[int] = []
        covered = 0
        for depth, after, steps in self.runs():
            count = int(min(after - depth, most - len(found), -((covered - enough) // steps)))
            found += [steps] * count
            covered += steps * count
            if len(found) >= most or covered >= enough:
                break
        return found

    def covering_lengths(self) -> list[int]:
        """The same as far as leaves are of use: those at lesser depths cover the stretch twice."""
        return self.lengths(min(self.steps, _MOST_FULL), 2 * self.steps)

    def last_lengths(self, most: int) -> list[int]:
        """The same for leaves at the stretch's end."""
        found: list[int] = []
        curve = self.way.last_bytes
        while len(found) < most and len(found) <= self.deepest_last:
            steps = self.last(len(found))
            after = min(1 + self._deepest(curve, max(1, steps)), 1 + self.deepest_last, most)
            found += [steps] * max(1, int(after - len(found)))
        return found

    def needed(self) -> int:
        """The fewest bytes in which leaves are as long at every depth."""
        lengths = self.covering_lengths()
        if len(lengths) == _MOST_FULL:
            return self.bytes
        lasts = self.last_lengths(len(lengths) + 1)
        needed = [0.0]
        for curve, found in ((self.costs.leaf_bytes, lengths), (self.way.last_bytes, lasts)):
            states = np.arange(len(found)) * self.costs.kept_state_bytes
            needed.append((curve.at(np.array(found, np.int64)) + states).max(initial=0.0))
        return min(self.bytes, math.ceil(max(needed)))

    def with_full_leaves(self) -> LeafRoom | None:
        """The room with the number of full leaves whose row is fastest; None where none reach.

        Each full leaf is slower for its steps, and saves calls at the deepest leaves.
        """
        whole = replace(self, longest=self.steps)
        if whole.last(0) >= self.steps:
            return None
        fitting = np.array(whole.covering_lengths(), np.int64)
        lasts = np.array(whole.last_lengths(len(fitting) + 1), np.int64)[1:]
        if not len(lasts):
            return None
        curve, advance = self.costs.leaf_seconds, self.costs.advance_seconds
        full, limited = fitting[: len(lasts)], np.minimum(fitting, self.longest)[: len(lasts)]
        steps = np.cumsum(full), np.cumsum(limited)
        seconds = np.cumsum(curve.at(full)), np.cumsum(curve.at(limited))

        def row_seconds(count: int) -> float:
            def chained(sums: tuple[Any, Any]) -> Any:
                rest = sums[1][count:] - sums[1][count - 1] + sums[0][count - 1]
                return np.concatenate([sums[0][:count], rest])

            covered = chained(steps)
            reaches = covered + lasts >= self.steps
            at = int(reaches.argmax())
            if not reaches[at]:
                return math.inf
            slack = covered[at] + lasts[at] - self.steps
            advanced = (self.steps - lasts[at]) * advance.slope + (at + 1) * advance(0)
            ends = curve(int(lasts[at])) - slack * curve.slope
            return float(chained(seconds)[at] + advanced + ends)

        best, least = len(full), row_seconds(len(full))
        apart = 1 << max(0, len(full).bit_length() - 6)
        tried = range(1, len(full), apart)
        while True:
            for count in tried:
                if (found := row_seconds(count)) < least:
                    best, least = count, found
            if apart == 1:
                return replace(self, full=best) if math.isfinite(least) else None
            lowest, highest = max(1, best - apart), min(len(full), best + apart)
            apart = max(1, apart // 8)
            tried = range(lowest, highest, apart)

    def row(self) -> list[tuple[int, int]] | None:
        """The fewest leaves that cover the stretch with no step advanced twice.

        Returns:
            (steps, count) in time order, or None where one level does not reach. The last
            leaf has all the steps it can have, since it is not advanced; the slack is taken
            from the leaves before it.
        """
        if self.last(0) >= self.steps:
            return [(self.steps, 1)]
        covered = 0
        for depth, after, steps in self.runs():
            most = int(min(after, self.deepest_last, depth + -(-self.steps // steps)))
            before = covered - depth * steps

            def reaches(count: int, before: int = before, steps: int = steps) -> bool:
                return before + count * steps + self.last(count) >= self.steps

            if most > depth and reaches(most):
                return self._filled(bisect_left(range(most), True, depth + 1, key=reaches))
            if most < after:
                return None
            covered += steps * (most - depth)
        return None

    def _filled(self, count: int) -> list[tuple[int, int]]:
        """`count` leaves, all but their last as long as may be, then the stretch's last one."""
        last = min(self.last(count), self.steps - count)
        left, filled = self.steps - last, []
        for depth, after, steps in self.runs():
            full = int(min(after, count - 1)) - depth
            if full > 0:
                filled.append((steps, full))
                left -= full * steps
            if after >= count:
                break
        # At least one step is left, since one leaf less would not have reached.
        return [*filled, (left, 1), (last, 1)]

    def _fitting(self, curve: Curve, depth: int) -> int:
        steps = curve.longest(self.bytes - depth * self.costs.kept_state_bytes)
        return max(0, int(min(steps, self.steps)))

    def _deepest(self, curve: Curve, steps: int) -> float:
        """The most states beside which a piece of so many steps fits; below 0 for none."""
        free = self.bytes - math.ceil(curve(steps))
        if self.costs.kept_state_bytes == 0:
            return math.inf if free >= 0 else -1
        return free // self.costs.kept_state_bytes
