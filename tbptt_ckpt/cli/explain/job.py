"""Measures how far back a gradient reaches, and what windows of such reaches take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tbptt_ckpt import ArgumentError, Costs, InfeasibleBudgetError, plan
from tbptt_ckpt.budget.amount import budget_bytes
from tbptt_ckpt.cli.explain.config import ExplainConfig
from tbptt_ckpt.cli.models import make_task
from tbptt_ckpt.cli.plan.job import measured_costs
from tbptt_ckpt.engine import Reach
from tbptt_ckpt.executor import ReplayExecutor
from tbptt_ckpt.profiling.measured_reach import MeasuredReach, reach_of
from tbptt_ckpt.profiling.sweep import Progress, Watch, unwatched
from tbptt_ckpt.schedule.plan import PredictedPlan


@dataclass(frozen=True, slots=True)
class Setting:
    """A k2, and what windows of it take.

    Attributes:
        k2: Steps back, a multiple of k1 where it is not the longest.
        tolerance: The smallest relative error that it is known to be within; None for others.
        plan: The fastest within the budget; None where nothing fits.
        retained: Plain BPTT, whatever it takes.
    """

    k2: int
    tolerance: float | None
    plan: PredictedPlan | None
    retained: PredictedPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """How far back the gradient of a model reaches, and what that costs.

    Attributes:
        what: The model, its data and its device.
        measured: The gradients.
        reaches: One for each tolerance.
        settings: Those worth trying, and all of the measured windows last.
        others: Further reaches, for a picture.
        budget_bytes: Within which windows are planned.
        costs: From which they are.
    """

    what: str
    measured: MeasuredReach
    reaches: list[Reach]
    settings: list[Setting]
    others: list[Setting]
    budget_bytes: int
    costs: Costs


def run_explaining_job(config: ExplainConfig, watch: Watch = unwatched) -> Explanation:
    """Measure gradients, then costs, and put them together."""
    config.check()
    task = make_task(config)
    work, k1, k2 = task.workload, config.k1, config.k2
    tolerances = sorted(set(config.tolerance), reverse=True)
    exact = config.replay(exact=True)  # else what is rounded would be missing of a gradient
    measured = reach_of(work, k1, k2, tolerances, config.windows, watch, exact)
    watch(Progress("measuring costs", 0, 1))
    executor = config.replay()
    costs = measured_costs(work, k2, executor)
    limit = budget_bytes(config.budget, "--budget", str(work.device))
    if limit is None:
        raise ArgumentError(f"--budget {config.budget} sets no limit; write a size such as 512MiB")
    reaches = [measured.reach(tolerance) for tolerance in tolerances]
    chosen = _chosen(reaches, k1, k2)
    powers = {k1 << power for power in range((k2 // k1).bit_length())} - chosen.keys()
    made = {
        steps: _setting(steps, chosen.get(steps), k1, costs, limit)
        for steps in sorted({*chosen, *powers})
    }
    return Explanation(
        what=f"{config.model} on {task.data}, measured on {work.device}{_stored(executor)}",
        measured=measured,
        reaches=reaches,
        settings=[made[steps] for steps in sorted(chosen)],
        others=[made[steps] for steps in sorted(powers)],
        budget_bytes=limit,
        costs=costs,
    )


def _stored(executor: ReplayExecutor) -> str:
    """How windows keep their states, where that is not as steps leave them."""
    return f", with states{stored}" if (stored := str(executor.storage)) else ""


def _chosen(reaches: Sequence[Reach], k1: int, k2: int) -> dict[int, float | None]:
    """Lengths worth trying, with the smallest tolerance that each is within; the longest too."""
    found: dict[int, float | None] = {k2: None}
    for reach in reaches:  # the smallest tolerance comes last
        if reach.within is not None:
            found[min(k2, -(-reach.within // k1) * k1)] = reach.tolerance
    return found


def _setting(steps: int, tolerance: float | None, k1: int, costs: Costs, limit: int) -> Setting:
    retained = plan(steps, costs, strategy="retain", new_steps=k1)
    try:
        fastest = plan(steps, costs, budget_bytes=limit, new_steps=k1)
    except InfeasibleBudgetError:
        return Setting(steps, tolerance, None, retained)
    return Setting(steps, tolerance, fastest, retained)
