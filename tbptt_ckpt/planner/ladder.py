"""What memory buys: how far windows reach within bytes, and what time each megabyte saves."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from tbptt_ckpt.arguments import Dimension, PositiveInt, checked
from tbptt_ckpt.planner.fastest import plan, quick_plan
from tbptt_ckpt.planner.feasibility import Demand, smallest_budget, ways
from tbptt_ckpt.planner.leaves import LeafRoom
from tbptt_ckpt.planner.pricing import reaches_by_level
from tbptt_ckpt.planner.search import DEEPEST
from tbptt_ckpt.schedule.costs import Costs
from tbptt_ckpt.schedule.plan import PredictedPlan

_MOST_LEVELS = 8  # of what is shown: below, a little more memory saves most of the time
# Reaches are looked for among these, of three digits.
_REACHES = [*range(1, 1000), *(n * 10**p for p in range(1, 11) for n in range(100, 1000))]
FARTHEST = _REACHES[-1]
MOST_PLANNED = 9_990_000  # longer windows are found, not planned: an update would take hours
_STEPS_PER_DOUBLING = 8
_FIRST_REACH, _MOST_REACHES = 100, 10  # beside the longest at none, one and two extra forwards


@dataclass(frozen=True, slots=True)
class Rung:
    """One budget."""

    budget_bytes: int
    plan: PredictedPlan


@dataclass(frozen=True, slots=True)
class Reach:
    """How a window of some length fits a budget.

    Attributes:
        plan: The fastest.
        retained: Plain BPTT, whatever it takes.
        levels: The extra forwards at which this is about the longest window; None for others.
    """

    plan: PredictedPlan
    retained: PredictedPlan
    levels: int | None


@checked
def longest_windows(budget_bytes: PositiveInt, costs: Costs) -> dict[int, int]:
    """About the most steps that fit at none, at one and at two extra forwards.

    Raises:
        InfeasibleBudgetError: Not even one step fits.
    """
    plan(1, costs, budget_bytes=budget_bytes)
    return {levels: farthest_reach(budget_bytes, costs, levels) for levels in (0, 1, 2)}


def reach_ladder(
    budget_bytes: int, costs: Costs, longest_by_levels: Mapping[int, int]
) -> Iterator[Reach]:
    """Windows that fit a budget, up to the longest at two extra forwards; one plan at a time.

    Among them are the longest of `longest_windows`, if they have at most `MOST_PLANNED` steps.
    """
    longest = {longest_by_levels[levels]: levels for levels in sorted(longest_by_levels)[::-1]}
    low, high = min(longest), min(MOST_PLANNED, max(longest))
    round_numbers = [digit * 10**power for power in range(8) for digit in (1, 2, 5)]
    between = [n for n in round_numbers if min(low / 5, _FIRST_REACH) <= n < high]
    every = -(-len(between) // _MOST_REACHES)
    marked = {num_steps for num_steps in longest if 0 < num_steps <= high}
    for num_steps in sorted({*between[::-1][::every], high, *marked}):
        yield Reach(
            quick_plan(num_steps, costs, budget_bytes),
            plan(num_steps, costs, strategy="retain"),
            longest.get(num_steps),
        )


@checked
def budget_ladder(num_steps: PositiveInt, costs: Costs, *, count: PositiveInt = 8) -> list[Rung]:
    """The fastest plans at up to `count` budgets, each larger than the last by the same factor.

    The factor applies to what is above the fixed part. The first budget is about the smallest in
    which no step runs more than nine times: near the smallest that works at all, a long window
    takes time in the square of its length. The last keeps everything, or is as fast.
    """
    fixed = Demand((num_steps,)).base_bytes(costs)
    most = plan(num_steps, costs, strategy="retain").predicted_peak_bytes
    least = _few_levels_budget(num_steps, most, costs)
    low, high = max(1, least - fixed), max(1, most - fixed)
    steps = range(1, count - 1)
    between = {fixed + round(low * (high / low) ** (step / (count - 1))) for step in steps}
    rungs: list[Rung] = []
    for budget in sorted({least, most, *(b for b in between if least < b < most)}):
        found = quick_plan(num_steps, costs, budget)
        if not rungs or found.predicted_seconds < rungs[-1].plan.predicted_seconds:
            rungs.append(Rung(budget, found))
    return rungs


def _few_levels_budget(num_steps: int, most_bytes: int, costs: Costs) -> int:
    """About the smallest budget in which few levels reach."""
    least = smallest_budget(Demand((num_steps,)), costs)
    doublings = max(1, most_bytes - least).bit_length()
    above = [round(2 ** (n / _STEPS_PER_DOUBLING)) for n in range(doublings * _STEPS_PER_DOUBLING)]
    budgets = [least, *(least + more for more in above if least + more < most_bytes), most_bytes]

    def reaches(budget_bytes: int) -> bool:
        return _reach(num_steps, budget_bytes, costs, _MOST_LEVELS) >= num_steps

    return max(least, budgets[min(bisect_left(budgets, True, key=reaches), len(budgets) - 1)])


@checked
def farthest_reach(budget_bytes: PositiveInt, costs: Costs, levels: Dimension) -> int:
    """About the most steps that fit with none advanced more than `levels` times.

    It is rounded down to three digits, and at most `FARTHEST`; 0 if not even one step fits.
    """

    def misses(num_steps: int) -> bool:
        return _reach(num_steps, budget_bytes, costs, levels) < num_steps

    found = bisect_left(_REACHES, True, key=misses)
    return _REACHES[found - 1] if found else 0


def _reach(num_steps: int, budget_bytes: int, costs: Costs, levels: int) -> int:
    """The most steps of a window of `num_steps` that so many levels cover, by any way."""
    demand = Demand((num_steps,))
    if not demand.fits(budget_bytes, costs):
        return 0
    free, (stretch,) = demand.free_bytes(budget_bytes, costs), demand.stretches
    rooms = [LeafRoom(num_steps, free, way, num_steps) for way in ways(stretch, costs)]
    return max(_covered(room, levels) for room in rooms)


def _covered(room: LeafRoom, levels: int) -> int:
    """The most steps of a stretch that so many levels cover."""
    alone = room.last(0)
    if alone >= room.steps or not levels:
        return alone
    leaves = room.lengths(DEEPEST, room.steps)
    ends = room.last_lengths(len(leaves) + 1)
    if not leaves or len(ends) < 2:
        return alone
    by_level = reaches_by_level(_depths(leaves), _depths(ends))
    return max(alone, next(islice(by_level, levels - 1, None)))


def _depths(lengths: Sequence[int]) -> NDArray[np.int64]:
    return np.array(lengths, np.int64)
