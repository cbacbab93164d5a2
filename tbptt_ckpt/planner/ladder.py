"""What time each megabyte buys: plans from the smallest budget to keeping everything."""

from __future__ import annotations

from dataclasses import dataclass

from tbptt_ckpt.arguments import PositiveInt, checked
from tbptt_ckpt.planner.fastest import plan
from tbptt_ckpt.planner.feasibility import Demand, smallest_budget
from tbptt_ckpt.schedule.costs import Costs
from tbptt_ckpt.schedule.plan import PredictedPlan


@dataclass(frozen=True, slots=True)
class Rung:
    """One budget."""

    budget_bytes: int
    plan: PredictedPlan


@checked
def budget_ladder(num_steps: PositiveInt, costs: Costs, *, count: PositiveInt = 10) -> list[Rung]:
    """The fastest plans at `count` budgets, each larger than the last by the same factor.

    The factor applies to what is above the fixed part. Near the smallest budget a long window
    runs its steps very often, and its plan takes seconds to make.

    Args:
        num_steps: Steps to differentiate.
        costs: What steps and states take.
        count: Budgets, the smallest and the one that keeps everything included.
    """
    demand = Demand((num_steps,))
    least = smallest_budget(demand, costs)
    most = plan(num_steps, costs, strategy="retain").predicted_peak_bytes
    fixed = demand.base_bytes(costs)
    low, high = max(1, least - fixed), max(1, most - fixed)
    budgets = {least, most}
    for step in range(1, count - 1):
        budgets.add(fixed + round(low * (high / low) ** (step / (count - 1))))
    chosen = sorted(budget for budget in budgets if least <= budget <= most)
    return [Rung(budget, plan(num_steps, costs, budget_bytes=budget)) for budget in chosen]
