"""Windows of which only the new steps have a loss: predicted, planned, and held to budgets."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import random
from dataclasses import replace

import pytest
from grids import covering, later
from planned_costs import check_prediction, random_costs

from tbptt_ckpt import Costs, InfeasibleBudgetError, plan, simulate
from tbptt_ckpt.schedule import Advance, Curve, Differentiate
from tbptt_ckpt.schedule.costs import QuietBytes
from tbptt_ckpt.schedule.curves import scaled


def readout_costs(
    state: int = 3, loss: float = 20, step: float = 2, cut: float = 0, call_seconds: float = 0.3
) -> Costs:
    """A step with a loss takes many times what one without takes."""
    return Costs(
        state_bytes=state,
        leaf_bytes=Curve.linear(cut, loss),
        leaf_seconds=Curve.linear(call_seconds, 3.0),
        advance_bytes=Curve.linear(0, 0.5),
        advance_seconds=Curve.linear(call_seconds, 1.0),
        last_leaf_bytes=Curve.linear(cut, loss * 0.9),
        quiet=QuietBytes(
            leaf=Curve.linear(cut + 1, step),
            graph=Curve.linear(cut, step),
            advance=Curve.linear(0, 0.1),
        ),
    )


COSTS = [
    readout_costs(),
    readout_costs(cut=7),
    readout_costs(loss=2.2, cut=4),
    readout_costs(state=12, loss=9, step=4),
    readout_costs(state=1, call_seconds=0.0),
]


class ExactSeconds:
    """The least seconds of a window by trying every split at every place."""

    def __init__(self, num_steps: int, num_losses: int, costs: Costs, free_bytes: int) -> None:
        self.stop, self.loss_start, self.costs = num_steps, num_steps - num_losses, costs
        self.free_bytes = free_bytes
        self.least = functools.cache(self._least)

    def _least(self, start: int, stop: int, depth: int) -> float:
        costs, free = self.costs, self.free_bytes - depth * self.costs.state_bytes
        losses = max(0, stop - max(start, self.loss_start))
        is_last = stop == self.stop
        best = math.inf
        if costs.leaf_peak(stop - start, losses, is_last=is_last) <= free:
            best = costs.leaf_seconds(stop - start)
        for cut in range(start + 1, stop):
            before = max(0, cut - max(start, self.loss_start))
            if costs.advance_peak(cut - start, before, 1) > free:
                continue
            parts = self.least(start, cut, depth) + self.least(cut, stop, depth + 1)
            best = min(best, costs.advance_seconds(cut - start) + parts)
        return best


def planned_seconds(num_steps: int, costs: Costs, budget: int, new_steps: int) -> float:
    try:
        found = plan(num_steps, costs, budget_bytes=budget, new_steps=new_steps)
    except InfeasibleBudgetError:
        return math.inf
    assert found.predicted_peak_bytes <= budget
    return found.predicted_seconds


@pytest.mark.parametrize("costs", [COSTS[0], *map(later, COSTS[1:-1]), COSTS[-1]])
def test_short_windows_are_planned_as_by_trying_every_split_at_every_place(costs: Costs) -> None:
    """But for parts in which losses begin and that are split when they are run again."""
    slower = []
    for num_steps, new_steps in ((9, 1), (9, 3), (12, 5), (11, 10), (10, 10), (10, 0)):
        for budget in range(4, 240, 9):
            least = ExactSeconds(num_steps, new_steps, costs, budget).least(0, num_steps, 0)
            found = planned_seconds(num_steps, costs, budget, new_steps)
            assert found >= least - 1e-9
            if math.isfinite(found):
                slower.append(found / least - 1)
    assert len(slower) > 140
    assert sum(excess > 1e-9 for excess in slower) <= 0.05 * len(slower)
    assert sum(slower) < 0.01 * len(slower)


WINDOWS = [{}, {"new_steps": 4}, {"new_steps": 1}, {"new_steps": 0}, {"new_steps": 30}]
WINDOWS += [{"new_steps": 4, "lead_steps": 5}]
JOINTS = [{"new_steps": n, "joints": (3, 6), "recorded_states": 4} for n in (1, 4, 5, 7)]


@covering(together=1, window=[*WINDOWS, *JOINTS], costs=COSTS)
def test_predictions_equal_the_simulation(costs: Costs, window: dict) -> None:
    for num_steps in (7, 12, 25):
        for strategy in ("optimal", "uniform:3", "revolve:3", "retain"):
            planned = plan(num_steps, costs, strategy=strategy, **window)
            shown = window if strategy != "retain" else {**window, "joints": ()}
            check_prediction(planned, costs, None, shown)
        for budget in range(10, 300, 37):
            with contextlib.suppress(InfeasibleBudgetError):
                planned = plan(num_steps, costs, budget_bytes=budget, **window)
                check_prediction(planned, costs, budget, window)


@pytest.mark.parametrize("window", [*WINDOWS, *JOINTS])
@pytest.mark.parametrize("costs", COSTS)
def test_the_smallest_budget_is_true(costs: Costs, window: dict) -> None:
    for num_steps in (7, 20):
        with pytest.raises(InfeasibleBudgetError) as caught:
            plan(num_steps, costs, budget_bytes=1, **window)
        least = caught.value.smallest_budget_bytes
        assert plan(num_steps, costs, budget_bytes=least, **window).predicted_peak_bytes <= least
        with pytest.raises(InfeasibleBudgetError):
            plan(num_steps, costs, budget_bytes=least - 1, **window)


@pytest.mark.parametrize("seed", [1, *map(later, (0, 2, 3))])
def test_more_budget_never_costs_more_time_whatever_the_curves(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(3):
        costs = replace(random_costs(rng), advance_seconds=Curve.linear(rng.choice([0, 2]), 1))
        share = rng.choice([0.05, 0.3, 0.9])
        leaf = scaled(costs.leaf_bytes, share)
        graph = rng.choice([None, scaled(leaf, 0.8)])
        quiet = QuietBytes(leaf, scaled(costs.advance_bytes, share), graph)
        costs, num_steps = replace(costs, quiet=quiet), rng.choice([60, 300, 800])
        window = {"new_steps": rng.choice([1, num_steps // 7, num_steps // 2])}
        most = plan(num_steps, costs, **window).predicted_peak_bytes
        try:
            plan(num_steps, costs, budget_bytes=1, **window)
        except InfeasibleBudgetError as error:
            least = error.smallest_budget_bytes
        before = math.inf
        for part in range(2, 13):
            budget = least + int((most - least) * (part / 12) ** 2)
            planned = plan(num_steps, costs, budget_bytes=budget, **window)
            check_prediction(planned, costs, budget, window)
            assert planned.predicted_seconds <= before * (1 + 1e-12)
            before = planned.predicted_seconds


def test_leaves_without_losses_are_longer_where_losses_are_large() -> None:
    """Most of a budget was unused before these were told apart."""
    costs, window = readout_costs(call_seconds=5.0), {"new_steps": 8}
    for num_steps in (100, 1000):
        apart = plan(num_steps, costs, budget_bytes=300, **window)
        alike = plan(num_steps, replace(costs, quiet=None), budget_bytes=300, **window)
        assert apart.predicted_seconds < 0.8 * alike.predicted_seconds
        assert apart.longest_leaf > 4 * alike.longest_leaf


def test_costs_from_before_steps_without_a_loss_were_told_apart_are_read() -> None:
    costs = readout_costs()
    assert Costs.from_dict(json.loads(json.dumps(costs.to_dict()))) == costs
    plain = costs.to_dict()
    del plain["quiet"]
    old = Costs.from_dict(plain)
    assert old == replace(costs, quiet=None)
    assert old.leaf_peak(9, 2) == old.leaf_peak(9, 9) > costs.leaf_peak(9, 2)


def test_a_leaf_in_which_losses_begin_is_simulated_as_two_parts() -> None:
    costs = readout_costs(cut=7)
    schedule = [Advance(0, 4), Differentiate(4, 9), Differentiate(0, 4)]
    found = simulate(schedule, costs, loss_start=6)
    begun = [peak for _, peak in found.timeline]
    assert begun[:2] == [1, 3 + (7 + 2 * 2) + (7 + 3 * 18)]
    assert begun[2] == 8 + 4 * 2
    assert simulate(schedule, costs).peak_bytes == 3 + 7 + 5 * 18
