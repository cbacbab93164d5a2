"""`plan`: from costs and a byte budget to the fastest plan of a window."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Final

from tbptt_ckpt.arguments import Dimension, PositiveInt, checked
from tbptt_ckpt.errors import ArgumentError, InfeasibleBudgetError, shown
from tbptt_ckpt.planner.bounds import SecondsBound
from tbptt_ckpt.planner.feasibility import (
    Demand,
    Stretch,
    certain_budget,
    largest_steps,
    smallest_budget,
)
from tbptt_ckpt.planner.predictions import (
    Prediction,
    advance_seconds,
    in_longest_calls,
    losses_of_copies,
    predict,
)
from tbptt_ckpt.planner.search import fastest_nestings, is_exact
from tbptt_ckpt.schedule.actions import usual_advance_steps
from tbptt_ckpt.schedule.costs import Costs
from tbptt_ckpt.schedule.nesting import Nesting
from tbptt_ckpt.schedule.plan import Block, Plan, PredictedPlan, plan_window, run_length_coded
from tbptt_ckpt.schedule.simulator import simulate
from tbptt_ckpt.schedule.strategies import AnyStrategy, Retain, parse_strategy

OPTIMAL: Final = "optimal"

_MOST_MADE = 32  # plans for one window; two to eight are usual


@checked
def plan(
    num_steps: PositiveInt,
    costs: Costs,
    *,
    budget_bytes: PositiveInt | None = None,
    strategy: AnyStrategy = OPTIMAL,
    new_steps: Dimension | None = None,
    lead_steps: Dimension = 0,
    joints: Sequence[int] = (),
    parted: bool = False,
    recorded_states: Dimension = 0,
    first: Dimension = 0,
) -> PredictedPlan:
    """The plan of one window that takes the least predicted seconds within a byte budget.

    It is made without writing its actions: ten million steps take a fraction of a second.

    Args:
        num_steps: Steps to differentiate: k2, fewer in the first windows.
        costs: What steps and states take.
        budget_bytes: Peak of device memory, everything included; None sets no limit.
        strategy: "optimal", or a fixed strategy as for `TBPTT`, whose bytes and seconds are
            predicted and held against the budget.
        new_steps: Steps that no window before has run: the last ones, which alone have a loss.
            Where they are more than `num_steps` (k2 < k1), those before only advance. None
            where every step has a loss.
        lead_steps: Steps before all these that only advance and have no loss: what a gradient
            does not reach that is stopped by lot.
        joints: Steps, counted from the first one differentiated, whose states are given
            (stale overlap). Blocks are cut there.
        parted: Whether the best plan has no leaf across one, as an audit of `k2="auto"` needs it.
        recorded_states: States that exist throughout beside the fixed part of the costs.
        first: Step of the window's first state, from which the plan counts.

    Raises:
        ArgumentError: A number that cannot work.
        InfeasibleBudgetError: No schedule, or not the fixed one, fits the budget.
        ScheduleError: A user's schedule that does not differentiate the window.

    References:
        Griewank & Walther (2000), doi:10.1145/347837.347846, whose recursion is the case of
        one-step leaves.
    """
    _check_joints(num_steps, new_steps, joints)
    if joints and lead_steps:
        raise ArgumentError(
            f"lead_steps={lead_steps} do not go with joints={list(joints)}: steps begin at a "
            "recorded state, or are advanced to"
        )
    lengths = tuple(b - a for a, b in pairwise([0, *joints, num_steps]))
    demand = Demand(lengths, new_steps, recorded_states, lead_steps, parted)
    if isinstance(strategy, str) and strategy == OPTIMAL:
        return _fastest(demand, costs, budget_bytes).at(first)
    start = first + demand.lead_steps
    placed = [start + joint for joint in joints]
    chosen = parse_strategy(strategy)
    fixed = plan_window(chosen, first, start, start + num_steps, placed)
    return _within(fixed, demand, costs, budget_bytes, placed)


def quick_plan(num_steps: int, costs: Costs, budget_bytes: int) -> PredictedPlan:
    """About the fastest plan within a budget, where many are asked for: one or two are made.

    `plan` makes up to thirty-two and may save a call or two.
    """
    demand = Demand((num_steps,))
    enough_bytes = _enough_bytes(demand, costs)
    if not demand.fits(budget_bytes, costs):
        raise _infeasible(demand, costs, budget_bytes)
    best = _made_for(min(budget_bytes, enough_bytes), demand, costs)
    if budget_bytes < enough_bytes and not is_exact(demand):
        whole = _made_for(enough_bytes, demand, costs)  # short leaves may be fast and small
        if whole.predicted_peak_bytes <= budget_bytes:
            best = min(best, whole, key=lambda found: found.predicted_seconds)
    return best


def _enough_bytes(demand: Demand, costs: Costs) -> int:
    """More bytes than these change nothing."""
    steps = demand.num_steps + demand.lead_steps
    actions_bytes = costs.most_bytes(steps) + costs.update_bytes
    return demand.base_bytes(costs) + actions_bytes + (steps + 1) * costs.state_bytes


def _check_joints(num_steps: int, new_steps: int | None, joints: Sequence[int]) -> None:
    if any(b <= a for a, b in pairwise([0, *joints, num_steps])):
        raise ArgumentError(f"joints={list(joints)} must be in order within 1..{num_steps - 1}")
    if joints and (new_steps or 0) > num_steps:
        raise ArgumentError(
            f"joints={list(joints)} do not go with new_steps={new_steps} above num_steps="
            f"{num_steps}: a window with steps that only advance has no recorded states inside"
        )


def _fastest(demand: Demand, costs: Costs, budget_bytes: int | None) -> PredictedPlan:
    """The fastest of the plans made for budgets up to the given one.

    NOTE [More bytes never cost more seconds]
    A plan made for more bytes may be slower than one made for fewer, by a call or two: leaves
    have whole steps. So plans are made for certain budgets only, the same whatever is asked
    for, and the fastest made for any of them up to the given one is taken. Few have to be
    looked at, since below some budget no plan can be as fast as one that is known.
    """
    enough_bytes = _enough_bytes(demand, costs)
    budget_bytes = enough_bytes if budget_bytes is None else min(budget_bytes, enough_bytes)
    if not demand.fits(budget_bytes, costs):
        raise _infeasible(demand, costs, budget_bytes)
    if is_exact(demand):
        return _made_for(budget_bytes, demand, costs)
    best = _made_for(enough_bytes, demand, costs)
    seconds, most_bytes = best.predicted_seconds, best.predicted_peak_bytes
    if most_bytes > budget_bytes:
        seconds, most_bytes = math.inf, budget_bytes
    bound, smallest_bytes = SecondsBound(demand, costs), smallest_budget(demand, costs)
    for _ in range(_MOST_MADE):
        if most_bytes < smallest_bytes:
            break
        less_bytes = certain_budget(smallest_bytes, most_bytes)
        free_bytes = demand.free_bytes(less_bytes, costs)
        if bound.rules_out(seconds, free_bytes):
            break
        found = _made_for(less_bytes, demand, costs)
        if found.predicted_seconds < seconds:
            best, seconds = found, found.predicted_seconds
        most_bytes = less_bytes - (free_bytes - bound.fewest_alike(free_bytes)) - 1
    return best


def _made_for(budget_bytes: int, demand: Demand, costs: Costs) -> PredictedPlan:
    """A plan that uses so many bytes well."""
    nestings = fastest_nestings(demand, demand.free_bytes(budget_bytes, costs), costs)
    blocks = run_length_coded(zip(demand.lengths, nestings, strict=True))
    planned = Plan(
        strategy=OPTIMAL,
        first=0,
        lead_steps=demand.lead_steps,
        blocks=blocks,
        advance_steps=1,
    )
    cut = _within(planned, demand, costs, budget_bytes, ())
    if len(demand.lengths) == 1 or demand.parted:
        return cut
    # A leaf over all blocks saves their calls.
    leaf = Retain().nesting(demand.num_steps, demand.num_steps)
    whole = replace(planned, blocks=(Block(demand.num_steps, leaf),))
    if _predict_blocks(whole, demand, costs, 1).peak_bytes > budget_bytes:
        return cut
    whole = _within(whole, demand, costs, budget_bytes, ())
    return min(cut, whole, key=lambda found: found.predicted_seconds)


def _within(
    planned: Plan,
    demand: Demand,
    costs: Costs,
    budget_bytes: int | None,
    joints: Sequence[int],
) -> PredictedPlan:
    """The plan with its predictions, its advances in calls that fit the budget."""

    def prediction(advance_steps: int) -> Prediction:
        if all(isinstance(block.how, Nesting) for block in planned.blocks):
            return _predict_blocks(planned, demand, costs, advance_steps)
        simulation = simulate(
            planned.schedule,
            costs,
            given=joints,
            recorded_states=demand.recorded_states,
            advance_steps=advance_steps,
            loss_start=planned.first + demand.lead_steps + demand.num_steps - demand.num_losses,
        )
        return Prediction(simulation.peak_bytes, simulation.seconds)

    usual = usual_advance_steps(planned.longest_leaf)
    advance_steps, found = in_longest_calls(usual, prediction, budget_bytes or math.inf)
    if budget_bytes is not None and found.peak_bytes > budget_bytes:
        raise _strategy_misses(planned.strategy, found.peak_bytes, demand, costs, budget_bytes)
    return planned.predicted(found.peak_bytes, found.seconds, advance_steps)


def _predict_blocks(planned: Plan, demand: Demand, costs: Costs, advance_steps: int) -> Prediction:
    """All blocks and the lead; the last block ends the window."""
    peaks, seconds = [costs.update_bytes], 0.0
    lead_state = 0
    if demand.lead_steps:
        peaks.append(costs.advance_peak(demand.lead_steps, demand.lead_losses, advance_steps))
        seconds += advance_seconds(costs, demand.lead_steps, advance_steps)
        lead_state = costs.kept_state_bytes
    losses, is_last = demand.num_losses, True
    for block in reversed(planned.blocks):
        assert isinstance(block.how, Nesting), "others are simulated"
        count = block.count
        while count:
            copies, each = next(losses_of_copies(count, block.steps, losses))
            if is_last:
                copies = 1
            stretch = Stretch(block.steps, each, is_last)
            one = predict(block.how, costs, advance_steps, stretch)
            peaks.append(lead_state + one.peak_bytes)
            seconds += copies * one.seconds
            losses, count, is_last = losses - copies * each, count - copies, False
    return Prediction(demand.base_bytes(costs) + max(peaks), seconds)


def _infeasible(demand: Demand, costs: Costs, budget_bytes: int) -> InfeasibleBudgetError:
    smallest = smallest_budget(demand, costs)
    most = largest_steps(demand, budget_bytes, costs)
    lower = f"reach back at most {most:,} steps" if most else "no number of steps fits this one"
    return InfeasibleBudgetError(
        f"no schedule meets budget_bytes={budget_bytes:,} for {demand.num_steps:,} steps; the "
        f"smallest that works for them is {smallest:,} bytes, or {lower}",
        smallest_budget_bytes=smallest,
        optimal_budget_bytes=smallest,
        largest_steps=most,
    )


def _strategy_misses(
    strategy: str, needed_bytes: int, demand: Demand, costs: Costs, budget_bytes: int
) -> InfeasibleBudgetError:
    smallest = smallest_budget(demand, costs)
    return InfeasibleBudgetError(
        f"strategy={shown(strategy)} needs {needed_bytes:,} bytes for {demand.num_steps:,} steps, "
        f"above budget_bytes={budget_bytes:,}; raise it, or use strategy='optimal', which works "
        f"from {smallest:,} bytes",
        smallest_budget_bytes=needed_bytes,
        optimal_budget_bytes=smallest,
        largest_steps=largest_steps(demand, budget_bytes, costs),
    )
