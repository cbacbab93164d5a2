"""The search: of the nestings that fit, the one with the least predicted seconds."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import count

from tbptt_ckpt.costs import Costs
from tbptt_ckpt.nesting import Nesting, NestingBuilder
from tbptt_ckpt.planner.leaves import LeafRoom
from tbptt_ckpt.planner.levels import DEEPEST, LevelBuilder, LevelTable, Rooms
from tbptt_ckpt.predictions import Prediction, predict, usual_advance_steps

_MORE_LEVELS = 2  # levels tried beyond the fewest that reach: fewer calls, more steps


def fastest_nestings(lengths: Sequence[int], free_bytes: int, costs: Costs) -> list[Nesting]:
    """Nestings of the blocks of a window that fits, in time order; the last one ends it.

    Args:
        lengths: Steps of each block; those of one length are planned once.
        free_bytes: For states and one leaf.
        costs: What steps take.
    """
    planned: dict[tuple[int, bool], Nesting] = {}
    for index, steps in enumerate(lengths):
        kind = (steps, index == len(lengths) - 1)
        if kind not in planned:
            planned[kind] = _fastest(steps, free_bytes, costs, is_last=kind[1])
    return [planned[n, index == len(lengths) - 1] for index, n in enumerate(lengths)]


def _fastest(steps: int, free_bytes: int, costs: Costs, *, is_last: bool) -> Nesting:
    """The nesting of one block whose first state is given."""
    best: tuple[tuple[float, int], Nesting] | None = None
    for nesting in _candidates(steps, free_bytes, costs, is_last=is_last):
        prediction = _fitting_prediction(nesting, costs, free_bytes, is_last=is_last)
        if prediction is None:
            continue
        rank = prediction.seconds, prediction.peak_bytes
        if best is None or rank < best[0]:
            best = rank, nesting
    assert best is not None, "the block fits"
    return best[1]


def _fitting_prediction(
    nesting: Nesting, costs: Costs, free_bytes: int, *, is_last: bool
) -> Prediction | None:
    """What a nesting takes with its advances in the longest calls that fit, if any do."""

    def prediction(advance_steps: int) -> Prediction:
        return predict(nesting, costs, advance_steps, is_last=is_last)

    usual = usual_advance_steps(nesting.longest_leaf)
    found = prediction(usual)
    if found.peak_bytes <= free_bytes:
        return found
    longest = bisect_left(
        range(1, usual), True, key=lambda n: prediction(n).peak_bytes > free_bytes
    )
    return prediction(longest) if longest else None


def _candidates(steps: int, free_bytes: int, costs: Costs, *, is_last: bool) -> Iterator[Nesting]:
    for longest in _leaf_limits(steps, costs):
        room = LeafRoom(steps, free_bytes, costs, is_last, longest)
        row = room.row()
        builder = NestingBuilder()
        if row is not None:
            yield builder.build(builder.chain(row))
        if row is None or (_calls_cost(costs) and len(row) > 1):
            yield from _with_levels(room, costs)


def _leaf_limits(steps: int, costs: Costs) -> list[int]:
    """Lengths beyond which a leaf's step takes more time: points of the measured curve."""

    def step_seconds(length: int) -> float:
        return costs.leaf_seconds(length) / length

    points = [p for p, _ in costs.leaf_seconds.points if 0 < p < steps]
    later = [*points[1:], steps]
    slower = [
        point
        for index, point in enumerate(points)
        if any(step_seconds(length) > step_seconds(point) for length in later[index:])
    ]
    return [steps, *slower]


def _calls_cost(costs: Costs) -> bool:
    return costs.advance_seconds(0) > 0 or costs.leaf_seconds(0) > 0


def _with_levels(room: LeafRoom, costs: Costs) -> Iterator[Nesting]:
    """Nestings of several levels; where calls cost time, with rooms of several least sizes."""
    shortest = 1
    while True:
        limited = LeafRoom(room.steps, room.bytes, room.costs, room.is_last, room.longest, shortest)
        rooms = _rooms(limited)
        if rooms is not None:
            yield from _levels_in(rooms, room.steps, is_last=room.is_last)
        shortest *= 2
        if not _calls_cost(costs) or rooms is None or shortest > rooms.leaves[0]:
            return


def _rooms(room: LeafRoom) -> Rooms | None:
    """Leaves by depth, or None where no state fits beside a leaf."""
    leaves = room.lengths(min(DEEPEST, room.steps))
    if len(leaves) < 2 or room.deepest_last < 1:
        return None
    deepest = int(min(room.deepest_last, len(leaves)))
    return Rooms(leaves, [room.last(depth) for depth in range(deepest + 1)])


def _levels_in(rooms: Rooms, steps: int, *, is_last: bool) -> Iterator[Nesting]:
    """One nesting for the fewest levels that reach, and for some more."""
    deepest = len(rooms.leaves) - 1
    full = LevelTable(rooms, deepest)
    fewest = next(n for n in count(2) if full.reach(n, 0, is_last=is_last) >= steps)
    tables = {deepest: full}

    def reach(row_end: int, levels: int) -> int:
        if row_end not in tables:
            tables[row_end] = LevelTable(rooms, row_end)
        return tables[row_end].reach(levels, 0, is_last=is_last)

    for levels in range(fewest, fewest + 1 + _MORE_LEVELS):
        row_end = bisect_left(range(deepest), steps, key=partial(reach, levels=levels))
        if row_end == 0:
            return  # rows of one leaf: as good as one level less
        reach(row_end - 1, levels)
        builder = NestingBuilder()
        split = LevelBuilder(builder, tables[row_end], tables[row_end - 1])
        yield builder.build(split.build(steps, levels, is_last=is_last))
