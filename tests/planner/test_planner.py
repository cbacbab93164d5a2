"""The planner: optimal against exact dynamic programming, and never slower with more bytes."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
from grids import covering, later
from planned_costs import check_prediction, line_costs, random_costs, random_window

from tbptt_ckpt import Costs, InfeasibleBudgetError, plan, simulate
from tbptt_ckpt.planner.bounds import SecondsBound
from tbptt_ckpt.planner.feasibility import Demand
from tbptt_ckpt.schedule import Curve

# (state bytes, bytes of a leaf's step, bytes of a leaf in addition)
RATIOS = [(1, 5, 0), (1, 1, 0), (3, 2, 0), (5, 1, 0), (20, 1, 0), (2, 3, 4)]
SOME_RATIOS = [ratio if ratio in ((1, 1, 0), (20, 1, 0)) else later(ratio) for ratio in RATIOS]
SHORT = 40


class ExactSteps:
    """The fewest executed steps for every length up to `longest`, by trying every split.

    A window of n steps in m bytes is one leaf if that fits, or is cut at some step: its first
    part is advanced and, when the second part is done, run again in all of m; the second part
    has a state less.
    """

    def __init__(self, state: int, step: int, leaf: int, longest: int) -> None:
        self.state, self.step, self.leaf, self.longest = state, step, leaf, longest
        self._known: dict[int, np.ndarray] = {}

    def __call__(self, num_bytes: int) -> np.ndarray:
        """By steps; infinity where nothing fits."""
        for fewer in range(num_bytes % self.state, num_bytes + 1, self.state):
            if fewer not in self._known:
                self._known[fewer] = self._row(fewer)
        return self._known[num_bytes]

    def _row(self, num_bytes: int) -> np.ndarray:
        row = np.full(self.longest + 1, np.inf)
        fitting = max(0, min(self.longest, (num_bytes - self.leaf) // self.step))
        row[: fitting + 1] = np.arange(fitting + 1)
        if fitting >= 1 and num_bytes - self.state >= self.leaf + self.step:
            below = self._known[num_bytes - self.state]
            for n in range(fitting + 1, self.longest + 1):
                cuts = np.arange(1, n)
                row[n] = (cuts + row[cuts] + below[n - cuts]).min()
        return row


def executed(num_steps: int, costs: Costs, budget: int) -> float:
    try:
        return plan(num_steps, costs, budget_bytes=budget).executed_steps
    except InfeasibleBudgetError:
        return math.inf


# Optimality.


@pytest.mark.parametrize("ratio", SOME_RATIOS)
def test_executed_steps_equal_exact_dynamic_programming(ratio: tuple[int, int, int]) -> None:
    """All sizes up to 40 and all budgets; there is no exception to name."""
    exact, costs = ExactSteps(*ratio, SHORT), line_costs(*ratio)
    for budget in range(1, ratio[1] * SHORT + ratio[2] + 2):
        wanted = exact(budget)
        for num_steps in range(1, SHORT + 1):
            assert executed(num_steps, costs, budget) == wanted[num_steps], (budget, num_steps)


# Above 256 steps prices decide. What they execute above the optimum, at most: leaves that shrink
# by 20 steps with every state leave few depths to choose from.
LARGEST_EXCESS = {(20, 1, 0): 0.01, (5, 1, 0): 0.005, (3, 2, 0): 0.002, (2, 3, 4): 0.002}


@pytest.mark.parametrize("ratio", SOME_RATIOS)
def test_longer_windows_are_close_to_the_optimum(ratio: tuple[int, int, int]) -> None:
    state, step, leaf = ratio
    exact, costs = ExactSteps(*ratio, 300), line_costs(*ratio)
    least, most = state + step + leaf, step * 300 + leaf
    excesses = []
    for part in range(10):
        budget = int(least + (most - least) * (part / 10) ** 3)
        for num_steps in (200, 257, 299, 300):
            excesses.append(executed(num_steps, costs, budget) / exact(budget)[num_steps] - 1)
    assert max(excesses) <= LARGEST_EXCESS.get(ratio, 0.0)
    assert np.mean(excesses) <= 0.001


def revolve_steps(num_steps: int, num_states: int) -> int:
    """Griewank & Walther 2000: r*l - C(s + r, s + 1) advances, and every step once more.

    r is the smallest number with C(s + r, s) >= l.
    """
    advances = next(r for r in itertools.count() if math.comb(num_states + r, r) >= num_steps)
    repeated = math.comb(num_states + advances, num_states + 1)
    return num_steps + advances * num_steps - repeated


@pytest.mark.parametrize("num_states", [1, 2, 3, 5, 8, 10, 20, 40])
def test_with_leaves_of_one_step_it_is_revolve(num_states: int) -> None:
    """A state takes one byte and a step a thousand, so that no leaf has two steps."""
    costs = line_costs(1, 1000, 0)
    for num_steps in (*range(1, SHORT + 1), 65, 100, 150, 333, 1000):
        if num_states == 1 and num_steps > 150:
            continue
        wanted = revolve_steps(num_steps, num_states)
        assert executed(num_steps, costs, 1000 + num_states) == wanted, num_steps
        fixed = plan(num_steps, costs, strategy=f"revolve:{num_states}")
        assert fixed.executed_steps == wanted, num_steps


def test_revolve_formula_gives_the_published_counts() -> None:
    published = {5: 7284, 10: 4636, 20: 3747, 40: 3097}
    assert {s: revolve_steps(1000, s) for s in published} == published


@pytest.mark.parametrize(("state", "step"), [(1, 5), (64, 230), (3, 1)])
@pytest.mark.parametrize("num_steps", [1000, 20_000])
def test_one_extra_forward_in_29_percent_less_than_equal_segments(
    state: int, step: int, num_steps: int
) -> None:
    """Growing leaves need sqrt(2 a s k2) bytes where equal ones need 2 sqrt(a s k2)."""
    costs = line_costs(state, step, 0)
    bound = math.sqrt(2 * step * state * num_steps)
    rounding = 2 * step + 2 * state  # a leaf has whole steps, and a row whole leaves
    growing = plan(num_steps, costs, budget_bytes=int(bound + rounding))
    assert growing.executed_steps < 2 * num_steps
    assert growing.predicted_peak_bytes <= bound + rounding
    equal = min(
        plan(num_steps, costs, strategy=f"uniform:{leaf}").predicted_peak_bytes
        for leaf in range(1, 3 * math.isqrt(num_steps * max(1, state // step) + num_steps))
    )
    assert equal >= 2 * math.sqrt(step * state * num_steps) - rounding
    least = smallest_with(lambda p: p.executed_steps < 2 * num_steps, num_steps, costs, equal)
    slack = 2 * rounding / equal
    assert 1 - least / equal == pytest.approx(1 - 1 / math.sqrt(2), abs=slack)


def smallest_with(accepted, num_steps: int, costs: Costs, enough: int) -> int:
    """The smallest budget whose plan is accepted; larger ones are too."""
    low, high = 0, enough
    while high - low > 1:
        middle = (low + high) // 2
        try:
            good = accepted(plan(num_steps, costs, budget_bytes=middle))
        except InfeasibleBudgetError:
            good = False
        low, high = (low, middle) if good else (middle, high)
    return high


# Time, not steps, is the objective.


def slow_long_leaves(call_seconds: float) -> Costs:
    """Beyond 16 steps a leaf's step takes half as long again."""
    seconds = Curve(((0, call_seconds), (16, 48 + call_seconds), (64, 264 + call_seconds)))
    return Costs(
        state_bytes=3,
        leaf_bytes=Curve.linear(0, 2),
        leaf_seconds=seconds,
        advance_bytes=Curve.linear(0, 0.1),
        advance_seconds=Curve.linear(call_seconds, 0.5),
    )


def test_without_a_budget_short_leaves_win_where_long_ones_are_slow() -> None:
    costs = slow_long_leaves(0.1)
    fastest = plan(1000, costs)
    assert fastest.longest_leaf < 100
    for strategy in ("retain", "step", "sqrt", *(f"uniform:{n}" for n in range(1, 200))):
        fixed = plan(1000, costs, strategy=strategy)
        assert fastest.predicted_seconds <= fixed.predicted_seconds, strategy


def test_without_a_budget_and_with_equal_steps_everything_is_retained() -> None:
    assert (
        plan(1000, line_costs(3, 2, 0, 0.5)).schedule
        == plan(1000, line_costs(3, 2, 0, 0.5), strategy="retain").schedule
    )


def test_blocks_are_one_leaf_where_that_saves_calls() -> None:
    """Under stale overlap, with room for everything and calls that cost."""
    window = {"joints": (10, 20, 30), "recorded_states": 4}
    for call_seconds, leaves in ((0.0, 4), (1.0, 1)):
        costs = line_costs(3, 2, 0, call_seconds)
        planned = plan(40, costs, **window)
        assert planned.num_leaves == leaves
        assert planned.executed_steps == 40
        assert plan(40, costs, budget_bytes=60, **window).num_leaves >= 4
        check_prediction(planned, costs, None, window)


def test_calls_that_cost_make_leaves_longer() -> None:
    """The same bytes, fewer leaves, more steps."""
    cheap = plan(5000, line_costs(5, 1, 0), budget_bytes=60)
    dear = plan(5000, line_costs(5, 1, 0, 50.0), budget_bytes=60)
    assert dear.num_leaves < cheap.num_leaves
    assert dear.executed_steps > cheap.executed_steps
    redone = simulate(cheap.schedule, line_costs(5, 1, 0, 50.0), advance_steps=cheap.advance_steps)
    assert dear.predicted_seconds < redone.seconds


@covering(together=1, ratio=RATIOS, call_seconds=[0.0, 0.7, 20.0])
def test_more_budget_never_costs_more_time(
    ratio: tuple[int, int, int], call_seconds: float
) -> None:
    costs = line_costs(*ratio, call_seconds)
    for num_steps in (7, 23, 40):
        check_never_slower(num_steps, costs, range(1, ratio[1] * num_steps + ratio[2] + 9))


def test_more_budget_never_costs_more_time_where_leaves_are_slow() -> None:
    for call_seconds in (0.1, 5.0):
        costs = slow_long_leaves(call_seconds)
        check_never_slower(60, costs, range(5, 130))
        check_never_slower(230, costs, range(5, 480, 25))


@covering(
    together=1,
    ratio=[(1, 5, 0), (10, 1, 0), (100, 50, 4), (65_536, 230_000, 4 << 20)],
    call_seconds=[0.0, 2.0, 20.0],
    size=[(300, 1), (2000, 2), (8_000, 3)],
)
def test_more_budget_never_costs_more_time_in_long_windows(
    ratio: tuple[int, int, int], call_seconds: float, size: tuple[int, int]
) -> None:
    """Not by a rounding error of leaves to whole steps either."""
    costs, (num_steps, least) = line_costs(*ratio, call_seconds), size
    check_never_slower(num_steps, costs, growing_budgets(num_steps, costs, 12)[least:])
    check_never_slower(num_steps, costs, growing_budgets(num_steps, costs, 10, 1.002))


@covering(together=1, call_seconds=[0.1, 5.0], size=[(300, 1), (1200, 3)])
def test_more_budget_never_costs_more_time_in_long_windows_where_leaves_are_slow(
    call_seconds: float, size: tuple[int, int]
) -> None:
    costs, (num_steps, least) = slow_long_leaves(call_seconds), size
    check_never_slower(num_steps, costs, growing_budgets(num_steps, costs, 12)[least:])
    check_never_slower(num_steps, costs, growing_budgets(num_steps, costs, 10, 1.004))


SLOW_SEEDS = [pytest.param(seed, marks=pytest.mark.exhaustive) for seed in (0, 4, 5)]


@pytest.mark.parametrize("seed", [1, later(2), later(3), *SLOW_SEEDS])
def test_more_budget_never_costs_more_time_for_bent_curves_and_any_window(seed: int) -> None:
    """Where longer calls advance a step no slower than short ones."""
    rng = random.Random(seed)
    for _ in range(3):
        advance = Curve.linear(rng.choice([0, 2]), 1)
        costs = replace(random_costs(rng), advance_seconds=advance)
        num_steps = rng.choice([100, 300, 1000])
        window = random_window(rng, num_steps)
        for factor in (1.002, 1.05):
            budgets = growing_budgets(num_steps, costs, 12, factor, window)
            check_never_slower(num_steps, costs, budgets, window)


def growing_budgets(
    num_steps: int, costs: Costs, count: int, factor: float = 0.0, window: dict | None = None
) -> list[int]:
    """From the smallest to all that helps; or by a factor, from somewhere between."""
    window = window or {}
    fixed = costs.fixed.total(max(num_steps, window.get("new_steps", 0)))
    least = 1 + fixed
    try:
        plan(num_steps, costs, budget_bytes=1, **window)
    except InfeasibleBudgetError as error:
        least = error.smallest_budget_bytes
    most = plan(num_steps, costs, strategy="retain", **window).predicted_peak_bytes
    low, high = least - fixed, max(least + 1, most) - fixed
    if factor:
        low, high = low * (high / low) ** 0.4, low * (high / low) ** 0.4 * factor**count
    budgets = {fixed + int(low * (high / low) ** (part / count)) for part in range(count + 1)}
    return sorted(budget for budget in budgets if budget >= least)


STRATEGIES = ("retain", "sqrt", "uniform:9", "uniform:40", "revolve:3", "revolve:30")


@pytest.mark.parametrize("seed", range(5))
def test_no_strategy_is_faster_than_the_bound_on_time(seed: int) -> None:
    """What lets the planner stop: at the peak of any schedule the bound is below its time."""
    rng = random.Random(seed)
    for _ in range(2):
        costs, num_steps = random_costs(rng), rng.choice([270, 500])
        demand = Demand((num_steps,))
        bound = SecondsBound(demand, costs)
        for strategy in STRATEGIES:
            fixed = plan(num_steps, costs, strategy=strategy)
            least = bound(demand.free_bytes(fixed.predicted_peak_bytes, costs))
            assert least <= fixed.predicted_seconds * (1 + 1e-12)
            fastest = plan(num_steps, costs, budget_bytes=fixed.predicted_peak_bytes)
            assert least <= fastest.predicted_seconds * (1 + 1e-12)
            assert fastest.predicted_seconds <= 1.02 * fixed.predicted_seconds


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_smallest_budget_of_long_windows_is_planned_exactly(
    ratio: tuple[int, int, int],
) -> None:
    exact, costs = ExactSteps(*ratio, 300), line_costs(*ratio)
    least = ratio[0] + ratio[1] + ratio[2]
    lighter = replace(costs, last_leaf_bytes=Curve.linear(0, ratio[1] / 2))
    for num_steps in (257, 280, 300):
        assert executed(num_steps, costs, least) == exact(least)[num_steps]
        assert executed(num_steps, costs, least - 1) == math.inf
        assert executed(num_steps, lighter, least) <= exact(least)[num_steps]
    assert plan(20_000, lighter, budget_bytes=least).predicted_peak_bytes <= least


def check_never_slower(
    num_steps: int, costs: Costs, budgets: Iterable[int], window: dict | None = None
) -> None:
    before = math.inf
    for budget in budgets:
        try:
            planned = plan(num_steps, costs, budget_bytes=budget, **(window or {}))
        except InfeasibleBudgetError:
            assert before == math.inf, (num_steps, budget)
            continue
        assert planned.predicted_peak_bytes <= budget
        assert planned.predicted_seconds <= before * (1 + 1e-12), (num_steps, budget)
        before = planned.predicted_seconds
