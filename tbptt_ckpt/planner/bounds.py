"""The least seconds that any plan of a window can take in so many bytes.

The price of a covered step (see `pricing`) bounds as well: a nesting that covers the stretch
takes at least its steps times the price, less the most that any nesting of the room is worth
at that price. More bytes never raise the bound, since they allow all that fewer bytes do.
"""

from __future__ import annotations

import math
from collections import Counter
from itertools import chain

import numpy as np

from tbptt_ckpt.planner.feasibility import Demand, Stretch, Way, way_fits, ways
from tbptt_ckpt.planner.leaves import LeafRoom
from tbptt_ckpt.planner.pricing import (
    BEYOND,
    MANY_LEVELS,
    ROUNDS,
    Floats,
    Ints,
    best_leaves,
    best_rows,
)
from tbptt_ckpt.planner.short import SHORT_STEPS, short_table
from tbptt_ckpt.schedule.actions import usual_advance_steps
from tbptt_ckpt.schedule.costs import Costs
from tbptt_ckpt.schedule.curves import Curve


def _least_rate(curve: Curve, most_steps: int) -> float:
    """Seconds a step takes at least, in calls of at most so many."""
    calls = {1, most_steps, *curve.bends(most_steps)}
    return min(curve(n) / n for n in calls)


class SecondsBound:
    """What no plan of a window goes below."""

    def __init__(self, demand: Demand, costs: Costs) -> None:
        self._demand, self._costs = demand, costs
        self._stretches = Counter(demand.stretches)
        self._prices: dict[tuple[int, Way], float] = {}

    def rules_out(self, seconds: float, free_bytes: int) -> bool:
        """Whether no plan in so many bytes is faster, to rounding; or none is known to be."""
        if math.isinf(seconds):
            return False
        least = self(free_bytes)
        return math.isinf(least) or least >= seconds * (1 - 1e-12)

    def __call__(self, free_bytes: int) -> float:
        """The least seconds with so many bytes for the states and one leaf of a block."""
        demand, costs = self._demand, self._costs
        rooms = {stretch: self._rooms(stretch, free_bytes) for stretch in self._stretches}
        if not all(rooms.values()):
            return math.inf
        longest = max(
            length
            for room in chain.from_iterable(rooms.values())
            for length in (1, room.leaf(0), room.last(0))
        )
        rate = _least_rate(costs.advance_seconds, usual_advance_steps(longest))
        seconds = demand.lead_steps * rate
        for stretch, count in self._stretches.items():
            if stretch.steps <= SHORT_STEPS:
                seconds += count * short_table(stretch, free_bytes, costs).seconds(stretch.steps)
                continue
            seconds += count * min(self._least(room, rate) for room in rooms[stretch])
        if len(demand.lengths) > 1:  # one leaf over all
            seconds = min(seconds, costs.leaf_seconds(demand.num_steps))
        return seconds

    def _least(self, room: LeafRoom, advance_rate: float) -> float:
        """What no plan in a room goes below, at the price found best in the first such room."""
        worth, kind = _Worth(room, advance_rate), (room.steps, room.way)
        if kind not in self._prices:
            self._prices[kind] = worth.tightest_price()
        return worth.bound(self._prices[kind])

    def _rooms(self, stretch: Stretch, free_bytes: int) -> list[LeafRoom]:
        """The rooms of the ways that fit."""
        return [
            LeafRoom(stretch.steps, free_bytes, way, stretch.steps)
            for way in ways(stretch, self._costs)
            if way_fits(way, stretch.steps, free_bytes)
        ]

    def fewest_alike(self, free_bytes: int) -> int:
        """The fewest bytes in which all leaves may be as long as in so many."""
        rooms = chain.from_iterable(self._rooms(each, free_bytes) for each in self._stretches)
        return max(room.needed() for room in rooms)


class _Worth:
    """The most that a nesting in a room is worth, by price."""

    def __init__(self, room: LeafRoom, advance_rate: float) -> None:
        self._room, self._advance_rate = room, advance_rate
        self._leaves = self._lasts = _Leaves(room, room.covering_lengths())
        self._is_cut = len(self._leaves.lengths) <= room.deepest_leaf  # more would fit
        if room.way.is_last:
            self._lasts = _Leaves(room, room.last_lengths(len(self._leaves.lengths) + 1))
        longest = max(self._leaves.longest, self._lasts.longest)
        self._leaf_rate = _least_rate(room.costs.leaf_seconds, longest)

    def tightest_price(self) -> float:
        """The price with the highest bound, which is concave in it."""
        steps, low = self._room.steps, self._leaf_rate
        high = low + max(self._advance_rate, 1e-9 * low)
        at_low, at_high = self._most(low), self._most(high)
        while at_low and at_high and at_high[1] < steps:
            low, at_low, high = high, at_high, 2 * high
            at_high = self._most(high)
        for _ in range(ROUNDS):
            if not (at_low and at_high) or at_high[1] <= at_low[1]:
                break
            # Both are straight lines around their prices; where they meet is the next price.
            met, worth = (low + high) / 2, -math.inf
            if at_high[1] < BEYOND:
                rise = at_low[0] - at_low[1] * low - at_high[0] + at_high[1] * high
                met = rise / (at_high[1] - at_low[1])
                worth = at_low[0] + at_low[1] * (met - low)
            found = self._most(met)
            if found is None or found[0] <= worth + 1e-12 * abs(worth):
                return met
            if found[1] < steps:
                low, at_low = met, found
            else:
                high, at_high = met, found
        return max(low, high, key=self.bound)

    def bound(self, price: float) -> float:
        """Seconds that no nesting of the stretch goes below; -inf where none is known."""
        most = self._most(price)
        return self._room.steps * price - most[0] if most else -math.inf

    def _most(self, price: float) -> tuple[float, int] | None:
        """Worth and steps of the best nesting; None where it has too many levels to tell.

        A leaf that is a left part is advanced in a call of its own; the other advances of its
        steps are parts of longer ones.
        """
        leaves, step = self._leaves, self._advance_rate
        most_levels = (price - self._leaf_rate) / step if step else math.inf
        if most_levels > MANY_LEVELS or not len(leaves.lengths):
            return None
        levels = math.ceil(max(0.0, most_levels)) + 1  # where every step is a loss
        left, covered = leaves.best(price - (levels - 1) * step, is_advanced=True)
        for advances in range(levels - 1, -1, -1):
            worth = price - advances * step
            values, steps = (leaves if advances else self._lasts).best(worth)
            if self._is_cut and values[-1] < self._room.steps * (worth - self._leaf_rate):
                values[-1] = self._room.steps * (worth - self._leaf_rate)
                steps[-1] = self._room.steps
            values, steps, _ = best_rows(values, steps, left, covered)
            steps = np.minimum(steps, BEYOND)
            if advances:
                alone, lengths = leaves.best(worth + step, is_advanced=True)
                split = left[:-1] + values[1:]
                is_better = split > alone[:-1]
                lengths[:-1][is_better] = (covered[:-1] + steps[1:])[is_better]
                alone[:-1][is_better] = split[is_better]
                left, covered = alone, np.minimum(lengths, BEYOND)
        return float(values[0]), int(steps[0])


class _Leaves:
    """Leaves of at most so many steps, by depth."""

    def __init__(self, room: LeafRoom, lengths: list[int]) -> None:
        self._costs, self.longest = room.costs, max(lengths, default=0)
        self.lengths = np.array(lengths, np.int64)
        leaf, advance = room.costs.leaf_seconds, room.costs.advance_seconds
        bends = sorted({1, *leaf.bends(self.longest), *advance.bends(self.longest)})
        distinct, where = np.unique(self.lengths, return_inverse=True)
        self._seconds = [
            np.array([self._least(n, is_advanced) for n in distinct.tolist()], float)[where]
            for is_advanced in (False, True)
        ]
        self._bend_seconds = [
            [(n, self._least(n, is_advanced)) for n in bends] for is_advanced in (False, True)
        ]

    def _least(self, steps: int, is_advanced: bool) -> float:
        """Time of a leaf, with the advance of just its steps if it has one, in any calls."""
        seconds = self._costs.leaf_seconds(steps)
        if is_advanced and steps:
            seconds += steps * _least_rate(self._costs.advance_seconds, steps)
        return seconds

    def best(self, price: float, *, is_advanced: bool = False) -> tuple[Floats, Ints]:
        """Worth and steps of the best leaf at each depth; a bend of the curve may be best."""
        seconds, bends = self._seconds[is_advanced], self._bend_seconds[is_advanced]
        return best_leaves(self.lengths, seconds, bends, price)
