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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
from numpy.typing import NDArray

from tbptt_ckpt.schedule.nesting import Nesting, NestingBuilder

MANY_LEVELS = 512  # up to which a price is looked for
ROUNDS = 60  # prices tried at most; about ten are needed
BEYOND = 1 << 45  # reaches are cut here, so that sums of them are numbers of 64 bits

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Rooms:
    """What a stretch of several levels is made of; its steps are more than one leaf's."""

    steps: int
    leaves: Ints  # steps of the longest leaf, by depth
    # The same for the leaf at the window's end; empty for other stretches.
    lasts: Ints
    leaf_seconds: Floats
    last_seconds: Floats
    step_seconds: float  # advancing one step
    call_seconds: float  # each advance in addition
    # (steps, seconds) of shorter leaves that may be worth more.
    bends: tuple[tuple[int, float], ...] = ()


class PriceTable:
    """The best segment at every number of advances and depth, for one price.

    A segment at depth d is a row: it is split at every depth from d on until one where a
    leaf is worth more, and a left part of one advance more hangs off each split.

    At a price of infinity as much is covered as can be. Segments that were never advanced end
    the stretch.
    """

    def __init__(self, rooms: Rooms, levels: int, price: float) -> None:
        self.price = price
        self._rows: list[tuple[Ints, NDArray[np.bool_]]] = []
        values, steps = np.empty(0), np.empty(0, np.int64)
        for advances in range(levels, -1, -1):
            at_end = advances == 0 and len(rooms.lasts) > 0
            lengths = rooms.lasts if at_end else rooms.leaves
            seconds = rooms.last_seconds if at_end else rooms.leaf_seconds
            if price == inf:
                leaf_values, call = np.zeros(len(lengths)), -1.0
            else:
                worth = price - advances * rooms.step_seconds
                leaf_values, lengths = best_leaves(lengths, seconds, rooms.bends, worth)
                call = rooms.call_seconds
            if advances == levels:
                is_leaf = np.ones(len(lengths), bool)
                values, steps = leaf_values, lengths
            else:
                values, steps, is_leaf = best_rows(leaf_values, lengths, values - call, steps)
                steps = np.minimum(steps, BEYOND)
            self._rows.append((steps, is_leaf))
        self.value = float(values[0])
        self.covered = int(steps[0])

    @property
    def seconds(self) -> float:
        """Time of the best segment that covers `covered` steps."""
        return self.covered * self.price - self.value

    def as_good_as(self, other: PriceTable) -> float:
        """The price at which the segments of both tables are worth the same."""
        return (other.seconds - self.seconds) / (other.covered - self.covered)

    def by_advances(self) -> tuple[list[list[int]], list[list[bool]]]:
        """Steps, and whether a leaf, by advances and depth."""
        rows = self._rows[::-1]
        return [steps.tolist() for steps, _ in rows], [leaf.tolist() for _, leaf in rows]


def best_leaves(
    lengths: Ints, seconds: Floats, bends: Sequence[tuple[int, float]], price: float
) -> tuple[Floats, Ints]:
    """Worth and steps of the best leaf at each depth: the longest, or one at a bend."""
    values, best = lengths * price - seconds, lengths.copy()
    for bend, bend_seconds in bends:
        is_better = (lengths >= bend) & (values < bend * price - bend_seconds)
        if is_better.any():
            values[is_better] = bend * price - bend_seconds
            best[is_better] = bend
    return values, best


def best_rows(
    leaf_values: Floats, lengths: Ints, left_values: Floats, left_steps: Ints
) -> tuple[Floats, Ints, NDArray[np.bool_]]:
    """Values, steps and whether a leaf, by depth, given the left parts of the splits.

    The segment at depth d that ends with the leaf at depth e is worth `leaf[e] + sum of
    left[d..e-1]`; the best e of all from d on is found by a running maximum from the deepest.
    """
    depths = len(lengths)
    worth = np.concatenate([[0.0], np.cumsum(left_values[: depths - 1])])
    covered = np.concatenate([[0], np.cumsum(left_steps[: depths - 1])])
    backwards = (leaf_values + worth)[::-1]
    best = np.maximum.accumulate(backwards)
    is_end = backwards >= best
    ends = (depths - 1) - np.maximum.accumulate(np.where(is_end, np.arange(depths), 0))[::-1]
    return best[::-1] - worth, lengths[ends] + covered[ends] - covered, is_end[::-1]


def neighbouring_tables(rooms: Rooms, levels: int) -> tuple[PriceTable, PriceTable]:
    """The best nestings that just do not reach and that just do.

    The next price is the one at which the two found so far are worth the same; where no
    third is worth more, nothing lies between them.
    """
    price = float(rooms.leaf_seconds[0] / rooms.leaves[0]) + rooms.step_seconds + 1e-9
    low, high = PriceTable(rooms, levels, 0.0), PriceTable(rooms, levels, price)
    while high.covered < rooms.steps:
        price *= 2
        low, high = high, PriceTable(rooms, levels, price)
    for _ in range(ROUNDS):
        is_cut = high.covered >= BEYOND
        price = (low.price + high.price) / 2 if is_cut else low.as_good_as(high)
        found = PriceTable(rooms, levels, price)
        known = low.covered * price - low.seconds
        if not is_cut and found.value <= known + 1e-12 * abs(known):
            break
        if found.covered < rooms.steps:
            low = found
        else:
            high = found
    return low, high


def reaches_by_level(leaves: Ints, ends: Ints) -> Iterator[int]:
    """The most steps that 1, 2, ... levels cover; there are leaves at two depths at least.

    `ends` are the leaves that end the stretch, by depth.
    """
    reaches = leaves
    while True:
        yield int(ends[-1] + reaches[: len(ends) - 1].sum())
        parts = np.append(reaches[:-1], leaves[-1])
        reaches = np.minimum(np.cumsum(parts[::-1])[::-1], BEYOND)


def fewest_levels(rooms: Rooms) -> int:
    """The fewest levels that reach so far; there are leaves at two depths at least."""
    ends = rooms.lasts if len(rooms.lasts) else rooms.leaves
    by_level = enumerate(reaches_by_level(rooms.leaves, ends), 1)
    return next(levels for levels, reach in by_level if reach >= rooms.steps)


def with_one_state(rooms: Rooms) -> Nesting:
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
    return builder.build(builder.split(node, 1, builder.chain([(steps, 1) for steps in end])))


class PriceBuilder:
    """Builds a nesting from the tables of prices just too low and just high enough.

    It has up to `more` levels beyond the fewest that reach.
    """

    def __init__(self, rooms: Rooms, more: int) -> None:
        fewest = fewest_levels(rooms)
        levels = fewest + more
        self._leaves: list[int] = rooms.leaves.tolist()
        self._lasts: list[int] = rooms.lasts.tolist()
        self._steps = rooms.steps
        self._builder = NestingBuilder()
        if levels <= MANY_LEVELS:
            low, high = neighbouring_tables(rooms, levels)
        else:  # few states and many levels: any plan is slow
            low, high = PriceTable(rooms, fewest - 1, inf), PriceTable(rooms, fewest, inf)
        self._low, self._low_is_leaf = low.by_advances()
        self._high, self._high_is_leaf = high.by_advances()
        if len(self._low) < len(self._high):
            self._low.append(self._leaves)
            self._low_is_leaf.append([True] * len(self._leaves))
        self._full: dict[tuple[bool, int, int], int] = {}

    def build(self) -> Nesting:
        """The nesting of the stretch.

        NOTE [One side at full reach]
        The stretch lies between what the two tables cover. A split hands one side all that
        one of the tables covers there, so that the rest lies between the tables on the other
        side; only that rest is split further.
        """
        known: list[tuple[int, bool]] = []  # (node, whether it is the left side)
        steps, advances, depth = self._steps, 0, 0
        while steps > self._lengths(advances)[depth]:
            most_left = self._high[advances + 1][depth]
            least_left = self._low[advances + 1][depth]
            least_right = self._low[advances][depth + 1]
            reaches = steps - least_right >= least_left
            if steps - most_left >= least_right:
                known.append((self._full_node(False, advances + 1, depth), True))
                steps, depth = steps - most_left, depth + 1
            elif not reaches and (row := self._row_of_leaves(steps, advances, depth)) is not None:
                break
            elif not reaches and steps - self._leaves[depth] <= self._high[advances][depth + 1]:
                known.append((self._builder.leaf(self._leaves[depth]), True))
                steps, depth = steps - self._leaves[depth], depth + 1
            else:
                known.append((self._full_node(True, advances, depth + 1), False))
                steps, advances = steps - least_right, advances + 1
        else:
            row = self._builder.leaf(steps)
        node = row
        for other, is_left in reversed(known):
            pair = (other, node) if is_left else (node, other)
            node = self._builder.split(pair[0], 1, pair[1])
        return self._builder.build(node)

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
