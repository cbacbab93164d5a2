"""Budgets that cannot be met, predictions held against the simulator, plans as data."""

from __future__ import annotations

import functools
import math
import random

import pytest
from grids import covering, later
from planned_costs import check_prediction, line_costs, random_costs, random_window

from tbptt_ckpt import ArgumentError, Costs, InfeasibleBudgetError, Plan, plan, simulate
from tbptt_ckpt.schedule import Curve, FixedBytes

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


WINDOWS = [
    {},
    {"new_steps": 12},
    {"joints": (3, 6), "recorded_states": 4},
    {"new_steps": 2, "lead_steps": 9},
]


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
    "lead_steps": {"lead_steps": -1},
    "lead_steps ": {"joints": (3,), "lead_steps": 2},
    "strategy": {"strategy": "fastest"},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name: str) -> None:
    arguments = {"num_steps": 10, "costs": line_costs(1, 1, 0), **BAD[name]}
    with pytest.raises(ArgumentError, match=name.strip()):
        plan(**arguments)


# Predicted and simulated are two accounts of one thing.


@covering(
    together=1,
    window=WINDOWS,
    costs=[odd_costs(), line_costs(5, 2, 1, 0.5), line_costs(0, 3, 0)],
)
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


@pytest.mark.parametrize("seed", [0, *map(later, range(1, 6))])
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


def test_long_windows_start_no_leaf_below_more_states_than_its_advance_fits_beside() -> None:
    """Where an advance needs more than a short leaf, equal leaves end at other depths than fit."""
    costs = Costs(
        state_bytes=10,
        leaf_bytes=Curve(((1, 200.0), (2, 500.0), (3, 560.0), (50, 5200.0))),
        leaf_seconds=Curve(((1, 0.001), (3, 0.001), (8, 0.006))),
        advance_bytes=Curve(((1, 800.0), (55, 1600.0))),
        advance_seconds=Curve(((1, 0.0003), (64, 0.004))),
    )
    for budget_bytes in range(1000, 2600, 400):
        found = plan(300, costs, budget_bytes=budget_bytes)
        simulated = simulate(found.schedule, costs, advance_steps=found.advance_steps)
        assert simulated.peak_bytes == found.predicted_peak_bytes <= budget_bytes
