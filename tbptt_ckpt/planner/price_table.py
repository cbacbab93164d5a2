"""The best segments at one price that each covered step is worth; see `pricing`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 60  # prices tried at most; about ten are needed

BEYOND = 1 << 45  # reaches are cut here, so that sums of them are numbers of 64 bits

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Rooms:
    """What a stretch of several levels is made of.

    Attributes:
        steps: Steps of the stretch, more than one leaf's.
        leaves: Steps of the longest leaf, by depth.
        lasts: The same for the leaf at the window's end; empty for other stretches.
        leaf_seconds, last_seconds: Their times.
        step_seconds: Advancing one step.
        call_seconds: Each advance in addition.
        bends: (steps, seconds) of shorter leaves that may be worth more.
    """

    steps: int
    leaves: Ints
    lasts: Ints
    leaf_seconds: Floats
    last_seconds: Floats
    step_seconds: float
    call_seconds: float
    bends: tuple[tuple[int, float], ...] = ()


class PriceTable:
    """The best segment at every number of advances and depth, for one price.

    A segment at depth d is a row: it is split at every depth from d on until one where a
    leaf is worth more, and a left part of one advance more hangs off each split.

    Args:
        rooms: Leaves by depth.
        levels: The most often that a step is advanced.
        price: What a covered step is worth, in seconds; infinity to cover as much as can be.

    Attributes:
        steps: Steps of the best segment, by advances and depth. Segments that were never
            advanced end the stretch.
        is_leaf: Whether it is a leaf.
        value: What the stretch is worth.
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
    for _ in range(_ROUNDS):
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
