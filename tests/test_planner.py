"""The planner: optimal against exact dynamic programming, true about budgets, monotone."""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest

from tbptt_ckpt import (
    ArgumentError,
    Costs,
    Curve,
    FixedBytes,
    InfeasibleBudgetError,
    Plan,
    plan,
    simulate,
)
from tbptt_ckpt.planner.bounds import SecondsBound
from tbptt_ckpt.planner.feasibility import Demand
from tbptt_ckpt.schedule.actions import check_schedule

# (state bytes, bytes of a leaf's step, bytes of a leaf in addition)
RATIOS = [(1, 5, 0), (1, 1, 0), (3, 2, 0), (5, 1, 0), (20, 1, 0), (2, 3, 4)]
SHORT = 40


def line_costs(state: int, step: int, leaf: int, call_seconds: float = 0.0) -> Costs:
    return Costs.linear(
        state_bytes=state, step_bytes=step, leaf_bytes=leaf, call_seconds=call_seconds
    )


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


@pytest.mark.parametrize("ratio", RATIOS)
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


@pytest.mark.parametrize("ratio", RATIOS)
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


@pytest.mark.parametrize("call_seconds", [0.0, 0.7, 20.0])
@pytest.mark.parametrize("ratio", RATIOS)
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


@pytest.mark.parametrize("call_seconds", [0.0, 2.0, 20.0])
@pytest.mark.parametrize("ratio", [(1, 5, 0), (10, 1, 0), (100, 50, 4), (65_536, 230_000, 4 << 20)])
def test_more_budget_never_costs_more_time_in_long_windows(
    ratio: tuple[int, int, int], call_seconds: float
) -> None:
    """Not by a rounding error of leaves to whole steps either."""
    costs = line_costs(*ratio, call_seconds)
    for num_steps, least in ((300, 1), (2000, 2), (20_000, 4)):
        check_never_slower(num_steps, costs, growing_budgets(num_steps, costs, 12)[least:])
        check_never_slower(num_steps, costs, growing_budgets(num_steps, costs, 10, 1.002))


def test_more_budget_never_costs_more_time_in_long_windows_where_leaves_are_slow() -> None:
    for call_seconds in (0.1, 5.0):
        costs = slow_long_leaves(call_seconds)
        for num_steps, least in ((300, 1), (5000, 5)):
            check_never_slower(num_steps, costs, growing_budgets(num_steps, costs, 12)[least:])
            check_never_slower(num_steps, costs, growing_budgets(num_steps, costs, 10, 1.004))


@pytest.mark.parametrize("seed", range(6))
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


# Budgets that cannot be met.


def odd_costs() -> Costs:
    """Every part of the costs at once; the last leaf takes less than others."""
    return Costs(
        state_bytes=7,
        leaf_bytes=Curve(((1, 9), (4, 20), (30, 99))),
        leaf_seconds=Curve(((1, 4), (10, 31), (40, 140))),
        advance_bytes=Curve(((1, 8), (5, 10), (64, 60))),
        advance_seconds=Curve.linear(0.5, 1.0),
        last_leaf_bytes=Curve(((1, 3), (40, 120))),
        update_bytes=15,
        fixed=FixedBytes(weights=11, step_inputs=0.3),
    )


WINDOWS = [{}, {"new_steps": 12}, {"joints": (3, 6), "recorded_states": 4}]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("costs", [odd_costs(), line_costs(5, 2, 1), line_costs(0, 3, 0)])
def test_both_numbers_of_an_infeasible_budget_are_true(costs: Costs, window: dict) -> None:
    for num_steps in range(1 + max(window.get("joints", (0,))), 15):
        for budget in range(1, 200, 1 if num_steps % 3 == 0 else 5):
            try:
                plan(num_steps, costs, budget_bytes=budget, **window)
            except InfeasibleBudgetError as error:
                check_smallest(error, num_steps, costs, window)
                check_largest(error, num_steps, costs, budget, window)
            else:
                break


def check_smallest(
    error: InfeasibleBudgetError, num_steps: int, costs: Costs, window: dict
) -> None:
    smallest = error.smallest_budget_bytes
    assert f"{smallest:,} bytes" in str(error)
    assert plan(num_steps, costs, budget_bytes=smallest, **window).predicted_peak_bytes <= smallest
    with pytest.raises(InfeasibleBudgetError):
        plan(num_steps, costs, budget_bytes=smallest - 1, **window)


def check_largest(
    error: InfeasibleBudgetError, num_steps: int, costs: Costs, budget: int, window: dict
) -> None:
    for fewer in range(num_steps - 1, 0, -1):
        try:
            plan(fewer, costs, budget_bytes=budget, **reaching_back(fewer, num_steps, window))
        except InfeasibleBudgetError:
            assert error.largest_steps != fewer
        else:
            assert error.largest_steps == fewer
            return
    assert error.largest_steps == 0


def reaching_back(fewer: int, num_steps: int, window: dict) -> dict:
    """The same window with a later start: joints before it are gone."""
    if "joints" not in window:
        return window
    moved = [joint - (num_steps - fewer) for joint in window["joints"]]
    kept = tuple(joint for joint in moved if joint > 0)
    return {"joints": kept, "recorded_states": 4 - (len(moved) - len(kept))}


@pytest.mark.parametrize("strategy", ["retain", "uniform:50", "sqrt", "revolve:9"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("costs", [odd_costs(), line_costs(5, 10, 0)])
def test_a_fixed_strategy_over_the_budget_says_what_it_needs_and_where_optimal_works(
    costs: Costs, window: dict, strategy: str
) -> None:
    with pytest.raises(InfeasibleBudgetError) as caught:
        plan(1000, costs, budget_bytes=30, strategy=strategy, **window)
    needed, least = caught.value.smallest_budget_bytes, caught.value.optimal_budget_bytes
    assert f"strategy={strategy!r} needs {needed:,} bytes" in str(caught.value)
    assert f"strategy='optimal', which works from {least:,} bytes" in str(caught.value)
    assert least <= needed
    for name, smallest in ((strategy, needed), ("optimal", least)):
        fitting = plan(1000, costs, budget_bytes=smallest, strategy=name, **window)
        assert fitting.predicted_peak_bytes <= smallest
        with pytest.raises(InfeasibleBudgetError):
            plan(1000, costs, budget_bytes=smallest - 1, strategy=name, **window)


BAD = {
    "num_steps": {"num_steps": 0},
    "budget_bytes": {"budget_bytes": 0},
    "budget_bytes ": {"budget_bytes": 1.5},
    "new_steps": {"new_steps": -1},
    "recorded_states": {"recorded_states": -1},
    "joints": {"joints": (4, 4)},
    "joints ": {"joints": (10,)},
    "joints  ": {"joints": (3,), "new_steps": 11},
    "strategy": {"strategy": "fastest"},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name: str) -> None:
    arguments = {"num_steps": 10, "costs": line_costs(1, 1, 0), **BAD[name]}
    with pytest.raises(ArgumentError, match=name.strip()):
        plan(**arguments)


# Predicted and simulated are two accounts of one thing.


def check_prediction(planned: Plan, costs: Costs, budget: int | None, window: dict) -> None:
    first = planned.first
    start, stop = first + planned.lead_steps, first + planned.lead_steps + planned.num_steps
    joints = [start + joint for joint in window.get("joints", ())]
    check_schedule(planned.schedule, first, start, stop, joints)
    simulation = simulate(
        planned.schedule,
        costs,
        given=joints,
        recorded_states=window.get("recorded_states", 0),
        advance_steps=planned.advance_steps,
    )
    assert simulation.peak_bytes == planned.predicted_peak_bytes
    assert simulation.seconds == pytest.approx(planned.predicted_seconds, rel=1e-9)
    assert simulation.executed_steps == planned.executed_steps
    assert simulation.num_boundaries == planned.num_boundaries
    assert budget is None or simulation.peak_bytes <= budget
    assert len(planned.schedule) == sum(1 for _ in planned.schedule)
    assert Plan.from_dict(planned.to_dict()) == planned


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("costs", [odd_costs(), line_costs(5, 2, 1, 0.5), line_costs(0, 3, 0)])
def test_predictions_equal_the_simulation_at_every_small_budget(costs: Costs, window: dict) -> None:
    for num_steps in (7, 11, 22):
        for budget in range(1, 220, 1 if num_steps == 7 else 7):
            try:
                planned = plan(num_steps, costs, budget_bytes=budget, first=3, **window)
            except InfeasibleBudgetError:
                continue
            check_prediction(planned, costs, budget, window)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("costs", [odd_costs(), line_costs(5, 2, 1, 0.5)])
@pytest.mark.parametrize("strategy", ["retain", "step", "sqrt", "uniform:4", "revolve:3"])
def test_predictions_of_fixed_strategies_equal_the_simulation(
    strategy: str, costs: Costs, window: dict
) -> None:
    for num_steps in range(1 + max(window.get("joints", (0,))), 40):
        planned = plan(num_steps, costs, strategy=strategy, **window)
        shown = {} if strategy == "retain" else window
        shown = {**shown, "recorded_states": window.get("recorded_states", 0)}
        check_prediction(planned, costs, None, shown)


def test_predictions_of_a_written_schedule_equal_the_simulation() -> None:
    costs = odd_costs()
    written = list(plan(21, costs, strategy="revolve:3").schedule)
    planned = plan(21, costs, strategy=written, first=5)
    check_prediction(planned, costs, None, {})
    assert planned.schedule == plan(21, costs, strategy="revolve:3", first=5).schedule


def random_curve(rng: random.Random, fixed: float, step: float) -> Curve:
    points, steps, value = [(1, fixed + step)], 1, fixed + step
    for _ in range(rng.randint(1, 4)):
        wide = rng.randint(1, 60)
        steps, value = steps + wide, value + wide * step * rng.uniform(0.5, 1.5)
        points.append((steps, value))
    return Curve.through(points)


def random_costs(rng: random.Random) -> Costs:
    step = rng.choice([0.5, 1, 7.3, 100])
    return Costs(
        state_bytes=rng.choice([0, 1, 3, 10, 100, 1000]),
        leaf_bytes=random_curve(rng, rng.choice([0, 20]), step),
        leaf_seconds=random_curve(rng, rng.choice([0, 5]), 3),
        advance_bytes=random_curve(rng, rng.choice([0, 5]), step / rng.choice([2, 10, 100])),
        advance_seconds=random_curve(rng, rng.choice([0, 2]), 1),
        last_leaf_bytes=rng.choice([None, random_curve(rng, 0, step)]),
        update_bytes=rng.choice([0, 500]),
        fixed=FixedBytes(weights=100, step_inputs=rng.choice([0, 0.3])),
    )


def random_window(rng: random.Random, num_steps: int) -> dict:
    kind = rng.choice(["plain", "plain", "lead", "joints"])
    if kind == "lead":
        return {"new_steps": num_steps + rng.randint(1, 9)}
    joints = range(rng.randint(1, 10), num_steps, rng.choice([10, 50]))
    if kind == "joints" and joints:
        return {"joints": tuple(joints), "recorded_states": len(joints) + 2}
    return {}


@pytest.mark.parametrize("seed", range(6))
def test_random_plans_fit_and_are_as_predicted(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(8):
        costs, num_steps = random_costs(rng), rng.choice([1, 2, 5, 30, 200, 1000])
        window = random_window(rng, num_steps)
        enough = plan(num_steps, costs, **window).predicted_peak_bytes
        try:
            least = plan(num_steps, costs, budget_bytes=1, **window).predicted_peak_bytes
        except InfeasibleBudgetError as error:
            least = error.smallest_budget_bytes
        for budget in (least, rng.randint(least, max(least, enough)), enough):
            planned = plan(num_steps, costs, budget_bytes=budget, **window)
            assert planned.predicted_peak_bytes <= budget
            if planned.executed_steps <= 30_000:
                check_prediction(planned, costs, budget, window)


# Plans are small, and data.


@pytest.mark.parametrize("fraction", [1.01, 0.4, 0.02])
def test_ten_million_steps_are_planned_without_writing_them(fraction: float) -> None:
    num_steps, costs = 10_000_000, line_costs(64 << 10, 230_000, 100_000)
    budget = int(fraction * math.sqrt(2 * 230_000 * (64 << 10) * num_steps)) + 400_000
    planned = plan(num_steps, costs, budget_bytes=budget)
    assert planned.num_steps == num_steps
    assert planned.predicted_peak_bytes <= budget
    assert num_steps < planned.executed_steps < 6 * num_steps
    assert sum(len(block.how.nodes) for block in planned.blocks) < 12_000
    assert next(iter(planned.schedule)).start == 0


@functools.cache
def a_plan() -> Plan:
    return plan(200, line_costs(5, 2, 1), budget_bytes=90)


def test_plans_are_compared_by_what_they_do() -> None:
    again = plan(200, line_costs(5, 2, 1), budget_bytes=90)
    assert again == a_plan()
    assert again.schedule == a_plan().schedule
    assert again != plan(200, line_costs(5, 2, 1), budget_bytes=100)
    assert again.at(7) != again
    assert again.at(7).schedule[0].start == 7


def test_a_plan_says_what_it_is() -> None:
    text = str(a_plan())
    assert "200 steps" in text
    assert f"{a_plan().executed_steps:,} executed" in text
    assert f"{a_plan().predicted_peak_bytes:,} bytes" in text


def test_short_windows_advance_only_where_a_step_of_it_fits_beside_the_kept_states() -> None:
    """The fastest split may keep a state beside which nothing can be advanced any more."""
    leaf = Curve(((3, 18.0), (4, 27.0), (32, 27.0)))
    costs = Costs(
        state_bytes=5,
        leaf_bytes=leaf,
        leaf_seconds=Curve(((2, 0.008), (32, 0.008))),
        advance_bytes=Curve(((1, 9.0), (2, 10.0), (12, 11.0))),
        advance_seconds=Curve(((12, 0.003), (24, 0.013))),
        last_leaf_bytes=Curve(((3, 14.0), (4, 26.0), (32, 26.0))),
    )
    for budget_bytes in range(9, 28):
        found = plan(17, costs, budget_bytes=budget_bytes)
        peak_bytes = simulate(found.schedule, costs, advance_steps=found.advance_steps).peak_bytes
        assert peak_bytes == found.predicted_peak_bytes <= budget_bytes
