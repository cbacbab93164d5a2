"""Several levels: nestings in which steps are advanced more than once.

With r levels the longest stretch at depth d is `N_r(d) = N_{r-1}(d) + N_r(d + 1)`: the left
part is advanced once and then has r - 1 levels, the right part starts one state deeper
(Griewank & Walther 2000, with leaves of many steps). Stretches shorter than the reach leave
open which splits are made. That is decided by a price p that each covered step is worth: a
segment that starts at depth d and was advanced a times is worth

    V(a, d) = max(L(d) (p - a f) - r(L(d)),  V(a + 1, d) + V(a, d + 1) - c),

a leaf or a split, with L(d) steps the longest leaf, r seconds to differentiate it, f seconds
to advance a step and c more for each call. The price is raised until the best nesting covers
the window. A nesting that is best at a price is the fastest of all that cover as many steps;
what the window lies below it is taken from segments about which the price is undecided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from math import inf

from tbptt_ckpt.nesting import NestingBuilder

_HALVINGS = 40
_MANY_SEGMENTS = 20_000  # kinds of segments up to which a price is looked for


@dataclass(frozen=True, slots=True)
class Rooms:
    """What a stretch of several levels is made of.

    Attributes:
        leaves: Steps of the longest leaf, by depth.
        lasts: The same for the leaf at the window's end; empty for other stretches.
        leaf_seconds, last_seconds: Their times.
        step_seconds: Advancing one step.
        call_seconds: Each advance in addition.
    """

    leaves: list[int]
    lasts: list[int]
    leaf_seconds: list[float]
    last_seconds: list[float]
    step_seconds: float
    call_seconds: float


def fewest_levels(rooms: Rooms, steps: int) -> int:
    """The fewest levels that reach so far; there are leaves at two depths at least."""
    reaches, ends = rooms.leaves, rooms.lasts or rooms.leaves
    for levels in count(1):
        if ends[-1] + sum(reaches[: len(ends) - 1]) >= steps:
            return levels
        sums = rooms.leaves[-1:]
        for left in reaches[-2::-1]:
            sums.append(sums[-1] + left)
        reaches = sums[::-1]
    raise AssertionError("reaches grow with every level")


class PriceTable:
    """The best segment at every number of advances and depth, for one price.

    Args:
        rooms: Leaves by depth.
        levels: The most often that a step is advanced.
        price: What a covered step is worth, in seconds; infinity to cover as much as can be.

    Attributes:
        steps: Steps of the best segment, by advances and depth. Segments that were never
            advanced end the stretch.
        is_leaf: Whether it is a leaf.
    """

    def __init__(self, rooms: Rooms, levels: int, price: float) -> None:
        self.steps: list[list[int]] = []
        self.is_leaf: list[list[bool]] = []
        self._rooms, self._price = rooms, price
        values: list[float] = []
        steps: list[int] = []
        for advances in range(levels, -1, -1):
            at_end = advances == 0 and bool(rooms.lasts)
            lengths = rooms.lasts if at_end else rooms.leaves
            values, steps, is_leaf = self._row(
                self._leaf_values(advances, at_end=at_end), lengths, values, steps
            )
            self.steps.append(steps)
            self.is_leaf.append(is_leaf)
        self.steps.reverse()
        self.is_leaf.reverse()

    def _leaf_values(self, advances: int, *, at_end: bool) -> list[float]:
        rooms, price = self._rooms, self._price
        if price == inf:
            return [0.0] * len(rooms.lasts if at_end else rooms.leaves)
        worth = price - advances * rooms.step_seconds
        lengths = rooms.lasts if at_end else rooms.leaves
        seconds = rooms.last_seconds if at_end else rooms.leaf_seconds
        return [n * worth - time for n, time in zip(lengths, seconds, strict=True)]

    def _row(
        self,
        leaf_values: Sequence[float],
        lengths: Sequence[int],
        left_values: Sequence[float],
        left_steps: Sequence[int],
    ) -> tuple[list[float], list[int], list[bool]]:
        """Values, steps and whether a leaf, by depth, given the segments advanced once more."""
        call = -1.0 if self._price == inf else self._rooms.call_seconds
        value, covered = leaf_values[-1], lengths[-1]
        values, steps, is_leaf = [value], [covered], [True]
        for depth in range(len(lengths) - 2, -1, -1):
            leaf = leaf_values[depth]
            split = left_values[depth] + value - call if left_values else -inf
            if split > leaf:
                value, covered = split, left_steps[depth] + covered
            else:
                value, covered = leaf, lengths[depth]
            values.append(value)
            steps.append(covered)
            is_leaf.append(split <= leaf)
        return values[::-1], steps[::-1], is_leaf[::-1]


class PriceBuilder:
    """Builds a nesting from the tables of prices just too low and just high enough.

    Args:
        rooms: Leaves by depth.
        steps: Steps to cover, more than a leaf.
        fewest: The fewest levels that reach so far.
        levels: The most often that a step may be advanced.
    """

    def __init__(self, rooms: Rooms, steps: int, fewest: int, levels: int) -> None:
        self._rooms, self._steps = rooms, steps
        self._builder = NestingBuilder()
        if levels * len(rooms.leaves) <= _MANY_SEGMENTS:
            self._low, self._high = self._tables(levels)
        else:  # few states and many levels: any plan is slow
            self._high = PriceTable(rooms, fewest, inf)
            self._low = PriceTable(rooms, fewest - 1, inf)
            self._low.steps.append(rooms.leaves)
            self._low.is_leaf.append([True] * len(rooms.leaves))
        self._full: dict[tuple[bool, int, int], int] = {}

    def _tables(self, levels: int) -> tuple[PriceTable, PriceTable]:
        """Tables of neighbouring prices; only the second one reaches."""
        least, most = 0.0, 0.0
        low = high = PriceTable(self._rooms, levels, most)
        while high.steps[0][0] < self._steps:
            least, low = most, high
            most = 2 * most if most else self._first_price()
            high = PriceTable(self._rooms, levels, most)
        for _ in range(_HALVINGS):
            middle = (least + most) / 2
            if high.steps[0][0] == self._steps or not least < middle < most:
                break
            found = PriceTable(self._rooms, levels, middle)
            if found.steps[0][0] < self._steps:
                least, low = middle, found
            else:
                most, high = middle, found
        return low, high

    def _first_price(self) -> float:
        return self._rooms.leaf_seconds[0] / self._rooms.leaves[0] + self._rooms.step_seconds + 1e-9

    def build(self) -> tuple[NestingBuilder, int]:
        """The node of the stretch.

        NOTE [One side at full reach]
        The stretch lies between what the two tables cover. A split hands one side all that
        one of the tables covers there, so that the rest lies between the tables on the other
        side; only that rest is split further.
        """
        known: list[tuple[int, bool]] = []  # (node, whether it is the left side)
        steps, advances, depth = self._steps, 0, 0
        while (node := self._undivided(steps, advances, depth)) is None:
            most_left = self._high.steps[advances + 1][depth]
            least_left = self._low.steps[advances + 1][depth]
            least_right = self._low.steps[advances][depth + 1]
            if steps - most_left >= least_right:
                known.append((self._full_node(False, advances + 1, depth), True))
                steps, depth = steps - most_left, depth + 1
            elif steps - least_right >= least_left:
                known.append((self._full_node(True, advances, depth + 1), False))
                steps, advances = steps - least_right, advances + 1
            elif (row := self._row_of_leaves(steps, advances, depth)) is not None:
                node = row
                break
            elif steps - self._rooms.leaves[depth] <= self._high.steps[advances][depth + 1]:
                known.append((self._builder.leaf(self._rooms.leaves[depth]), True))
                steps, depth = steps - self._rooms.leaves[depth], depth + 1
            else:
                known.append((self._full_node(True, advances, depth + 1), False))
                steps, advances = steps - least_right, advances + 1
        for other, is_left in reversed(known):
            pair = (other, node) if is_left else (node, other)
            node = self._builder.split(pair[0], 1, pair[1])
        return self._builder, node

    def _undivided(self, steps: int, advances: int, depth: int) -> int | None:
        """A leaf, where the steps fit one."""
        fits = steps <= self._lengths(advances)[depth]
        return self._builder.leaf(steps) if fits else None

    def _row_of_leaves(self, steps: int, advances: int, depth: int) -> int | None:
        """The fewest leaves with no step advanced once more, if that reaches."""
        ends, left = self._lengths(advances), steps
        leaves: list[int] = []
        for at in range(depth, len(ends)):
            if left <= ends[at]:
                last = min(ends[at], steps - len(leaves))
                leaves[-1] += left - last
                return self._builder.chain([(length, 1) for length in [*leaves, last]])
            if at == len(self._rooms.leaves):
                return None
            leaves.append(self._rooms.leaves[at])
            left -= leaves[-1]
        return None

    def _lengths(self, advances: int) -> list[int]:
        return self._rooms.lasts if advances == 0 and self._rooms.lasts else self._rooms.leaves

    def _full_node(self, is_low: bool, advances: int, depth: int) -> int:
        """The node of all that a table covers at a number of advances and a depth."""
        table = self._low if is_low else self._high
        todo = [(advances, depth)]
        while todo:
            a, d = todo[-1]
            if (is_low, a, d) in self._full:
                todo.pop()
            elif table.is_leaf[a][d]:
                self._full[is_low, a, d] = self._builder.leaf(table.steps[a][d])
            else:
                left = self._full.get((is_low, a + 1, d))
                right = self._full.get((is_low, a, d + 1))
                if left is None:
                    todo.append((a + 1, d))
                if right is None:
                    todo.append((a, d + 1))
                if left is not None and right is not None:
                    self._full[is_low, a, d] = self._builder.split(left, 1, right)
        return self._full[is_low, advances, depth]
