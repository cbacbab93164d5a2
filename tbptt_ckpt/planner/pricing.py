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

from itertools import count
from math import inf

import numpy as np

from tbptt_ckpt.planner.price_table import BEYOND, PriceTable, Rooms, neighbouring_tables
from tbptt_ckpt.schedule.nesting import NestingBuilder

_MANY_LEVELS = 512  # up to which a price is looked for


def fewest_levels(rooms: Rooms) -> int:
    """The fewest levels that reach so far; there are leaves at two depths at least."""
    reaches, ends = rooms.leaves, rooms.lasts if len(rooms.lasts) else rooms.leaves
    for levels in count(1):
        if ends[-1] + reaches[: len(ends) - 1].sum() >= rooms.steps:
            return levels
        parts = np.append(reaches[:-1], rooms.leaves[-1])
        reaches = np.minimum(np.cumsum(parts[::-1])[::-1], BEYOND)
    raise AssertionError("reaches grow with every level")


def with_one_state(rooms: Rooms) -> tuple[NestingBuilder, int]:
    """The nesting where no leaf starts two states deep: each starts from an advance of its own.

    The last leaf, if it takes less, may start two states deep. The one choice is where the
    slack is: in the first leaf, whose steps are advanced most.
    """
    builder = NestingBuilder()
    longest, leaf = int(rooms.leaves[0]), int(rooms.leaves[1])
    ends: list[tuple[int, ...]] = [(int(rooms.lasts[1]) if len(rooms.lasts) else leaf,)]
    if len(rooms.lasts) > 2:
        ends.append((leaf, int(rooms.lasts[2])))
    end = max((end for end in ends if sum(end) < rooms.steps), key=sum)
    count = max(0, -(-(rooms.steps - sum(end) - longest) // leaf))
    node, part = builder.leaf(rooms.steps - sum(end) - count * leaf), builder.leaf(leaf)
    for _ in range(count):
        node = builder.split(node, 1, part)
    return builder, builder.split(node, 1, builder.chain([(steps, 1) for steps in end]))


class PriceBuilder:
    """Builds a nesting from the tables of prices just too low and just high enough.

    Args:
        rooms: Leaves by depth.
        fewest: The fewest levels that reach so far.
        levels: The most often that a step may be advanced.
    """

    def __init__(self, rooms: Rooms, fewest: int, levels: int) -> None:
        self._leaves: list[int] = rooms.leaves.tolist()
        self._lasts: list[int] = rooms.lasts.tolist()
        self._steps = rooms.steps
        self._builder = NestingBuilder()
        if levels <= _MANY_LEVELS:
            low, high = neighbouring_tables(rooms, levels)
        else:  # few states and many levels: any plan is slow
            low, high = PriceTable(rooms, fewest - 1, inf), PriceTable(rooms, fewest, inf)
        self._low, self._low_is_leaf = low.by_advances()
        self._high, self._high_is_leaf = high.by_advances()
        if len(self._low) < len(self._high):
            self._low.append(self._leaves)
            self._low_is_leaf.append([True] * len(self._leaves))
        self._full: dict[tuple[bool, int, int], int] = {}

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
            most_left = self._high[advances + 1][depth]
            least_left = self._low[advances + 1][depth]
            least_right = self._low[advances][depth + 1]
            if steps - most_left >= least_right:
                known.append((self._full_node(False, advances + 1, depth), True))
                steps, depth = steps - most_left, depth + 1
            elif steps - least_right >= least_left:
                known.append((self._full_node(True, advances, depth + 1), False))
                steps, advances = steps - least_right, advances + 1
            elif (row := self._row_of_leaves(steps, advances, depth)) is not None:
                node = row
                break
            elif steps - self._leaves[depth] <= self._high[advances][depth + 1]:
                known.append((self._builder.leaf(self._leaves[depth]), True))
                steps, depth = steps - self._leaves[depth], depth + 1
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
            if at == len(self._leaves):
                return None
            leaves.append(self._leaves[at])
            left -= leaves[-1]
        return None

    def _lengths(self, advances: int) -> list[int]:
        return self._lasts if advances == 0 and self._lasts else self._leaves

    def _full_node(self, is_low: bool, advances: int, depth: int) -> int:
        """The node of all that a table covers at a number of advances and a depth."""
        steps = self._low if is_low else self._high
        is_leaf = self._low_is_leaf if is_low else self._high_is_leaf
        todo = [(advances, depth)]
        while todo:
            a, d = todo[-1]
            if (is_low, a, d) in self._full:
                todo.pop()
            elif is_leaf[a][d]:
                self._full[is_low, a, d] = self._builder.leaf(steps[a][d])
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
