"""The search: of the nestings that fit, the one with the least predicted seconds."""

from __future__ import annotations

from functools import cache

import numpy as np

from tbptt_ckpt.planner.blocks import in_blocks, in_steps
from tbptt_ckpt.planner.feasibility import Demand, Stretch, Way, way_fits, ways
from tbptt_ckpt.planner.leaves import LeafRoom
from tbptt_ckpt.planner.predictions import Prediction, in_longest_calls, predict
from tbptt_ckpt.planner.pricing import PriceBuilder, Rooms, with_one_state
from tbptt_ckpt.planner.short import SHORT_STEPS, short_table
from tbptt_ckpt.schedule.actions import ADVANCE_STEPS, usual_advance_steps
from tbptt_ckpt.schedule.costs import Costs
from tbptt_ckpt.schedule.nesting import Nesting, NestingBuilder

_MORE_LEVELS = 2  # levels allowed beyond the fewest that reach: fewer calls, more steps
_SLOWER = 1 + 1e-9  # than rounding errors make it
DEEPEST = 1 << 14  # states; more levels are taken rather than more states
DEEPEST_TRIED = 1 << 10  # where one level reaches, more are tried with so many states at most


def is_exact(demand: Demand) -> bool:
    """Whether every split of every block is tried."""
    return max(demand.lengths) <= SHORT_STEPS


def fastest_nestings(demand: Demand, free_bytes: int, costs: Costs) -> list[Nesting]:
    """Nestings of the blocks of a window that fits, in time order; those alike are planned once."""
    planned = cache(lambda stretch: _fastest(stretch, free_bytes, costs))
    return [planned(stretch) for stretch in demand.stretches]


def _fastest(stretch: Stretch, free_bytes: int, costs: Costs) -> Nesting:
    """In whole blocks, where these fit: what is left of a leaf takes more time than costs say."""
    if costs.block_steps > 1:
        blocks, of_blocks = in_blocks(stretch, costs.block_steps), costs.of_blocks()
        if any(way_fits(way, blocks.steps, free_bytes) for way in ways(blocks, of_blocks)):
            found = _Search(blocks, free_bytes, of_blocks).fastest()
            return in_steps(found, costs.block_steps, stretch.steps)
    return _Search(stretch, free_bytes, costs).fastest()


class _Search:
    """Looks for the nesting of one block whose first state is given."""

    def __init__(self, stretch: Stretch, free_bytes: int, costs: Costs) -> None:
        self._stretch, self._free_bytes, self._costs = stretch, free_bytes, costs
        self._best: tuple[tuple[float, int], Nesting] | None = None

    def fastest(self) -> Nesting:
        """The fastest of all that are tried."""
        stretch, free_bytes = self._stretch, self._free_bytes
        if stretch.steps <= SHORT_STEPS:
            self._consider(short_table(stretch, free_bytes, self._costs).nesting(stretch.steps))
        for way in ways(stretch, self._costs):
            if way_fits(way, stretch.steps, free_bytes):
                self._try(way)
        assert self._best is not None, "the block fits"
        return self._best[1]

    def _try(self, way: Way) -> None:
        """Leaves of every length that may be the longest, in a row and with several levels."""
        steps, free_bytes = self._stretch.steps, self._free_bytes
        fitting = LeafRoom(steps, free_bytes, way, steps).leaf(0)
        for longest in _leaf_limits(steps, way.costs):
            if fitting <= longest < steps:
                continue  # no limit at all
            room = LeafRoom(steps, free_bytes, way, longest)
            row = room.row()
            self._consider_row(row)
            if longest < steps and (some_full := room.with_full_leaves()) is not None:
                self._consider_row(some_full.row())
            if steps > SHORT_STEPS and (row is None or len(row) > 1):
                is_hopeful = self._best is None or _least_seconds(room) < self._best[0][0]
                if is_hopeful:
                    self._consider(_with_levels(room, is_needed=row is None))

    def _consider_row(self, row: list[tuple[int, int]] | None) -> None:
        if row is not None:
            builder = NestingBuilder()
            self._consider(builder.build(builder.chain(row)))

    def _consider(self, nesting: Nesting | None) -> None:
        prediction = nesting and self._fitting_prediction(nesting)
        if nesting and prediction:
            rank = prediction.seconds, prediction.peak_bytes
            if self._best is None or rank < self._best[0]:
                self._best = rank, nesting

    def _fitting_prediction(self, nesting: Nesting) -> Prediction | None:
        """What a nesting takes with its advances in the longest calls that fit, if any do."""

        def prediction(advance_steps: int) -> Prediction:
            return predict(nesting, self._costs, advance_steps, self._stretch)

        usual = usual_advance_steps(nesting.longest_leaf)
        _, found = in_longest_calls(usual, prediction, self._free_bytes)
        return found if found.peak_bytes <= self._free_bytes else None


def _least_seconds(room: LeafRoom) -> float:
    """A bound on the time of several levels: no plan of them is faster.

    At most one leaf is never advanced, and of those advanced once there is at most one at
    every depth.
    """
    costs = room.costs
    once, depths = 0, 0
    for depth, after, steps in room.runs():
        count = min(after - depth, room.steps)
        once, depths = once + int(count) * steps, depths + int(count)
        if once >= room.steps:
            break
    advanced = max(0, room.steps - room.last(0))
    advanced += max(0, room.steps - room.last(0) - once)
    longest = min(room.longest, room.last(0))
    lengths = [*costs.leaf_seconds.bends(longest), longest]
    leaf_rate = min(costs.leaf_seconds(n) / n for n in lengths)
    return leaf_rate * room.steps + costs.advance_seconds.slope * advanced


def _leaf_limits(steps: int, costs: Costs) -> list[int]:
    """Lengths beyond which a leaf's step takes more time: points of the measured curve."""

    def step_seconds(length: int) -> float:
        return costs.leaf_seconds(length) / length

    points = costs.leaf_seconds.bends(steps)
    later = [*points[1:], steps]
    slower = [
        point
        for index, point in enumerate(points)
        if any(step_seconds(length) > _SLOWER * step_seconds(point) for length in later[index:])
    ]
    return [steps, *slower]


def _with_levels(room: LeafRoom, *, is_needed: bool) -> Nesting | None:
    """A nesting of several levels, where a state fits beside a leaf."""
    rooms = _rooms(room, DEEPEST if is_needed else DEEPEST_TRIED)
    if rooms is None:
        return None
    if len(rooms.leaves) == 2 and len(rooms.lasts) != 1:
        return with_one_state(rooms)
    return PriceBuilder(rooms, _MORE_LEVELS).build()


def _rooms(room: LeafRoom, deepest: int) -> Rooms | None:
    """Leaves by depth, or None where no state fits beside a leaf or too many do."""
    leaves = room.lengths(min(deepest, room.steps))
    if (
        len(leaves) < 2
        or room.deepest_last < 1
        or deepest < min(room.steps, DEEPEST, room.deepest_leaf)
    ):
        return None
    lasts = []
    if room.way.is_last:
        lasts = room.last_lengths(len(leaves) + 1)
    seconds = room.costs.leaf_seconds
    bends = seconds.bends(leaves[0]) if len(seconds.points) > 2 else []
    return Rooms(
        steps=room.steps,
        leaves=np.array(leaves, np.int64),
        lasts=np.array(lasts, np.int64),
        leaf_seconds=np.array([seconds(steps) for steps in leaves], float),
        last_seconds=np.array([seconds(steps) for steps in lasts], float),
        step_seconds=room.costs.advance_seconds(ADVANCE_STEPS) / ADVANCE_STEPS,
        call_seconds=room.costs.advance_seconds(0),
        bends=tuple((steps, seconds(steps)) for steps in bends),
    )
