"""Plans windows from measured or given costs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from tbptt_ckpt import ArgumentError, Costs, InfeasibleBudgetError, Workload
from tbptt_ckpt import plan as plan_steps
from tbptt_ckpt.budget.amount import AUTO_BUDGET, budget_bytes
from tbptt_ckpt.budget.forms import fastest_form
from tbptt_ckpt.budget.lengths import Limits
from tbptt_ckpt.budget.stored_states import with_stored_states
from tbptt_ckpt.cli.models import make_task
from tbptt_ckpt.cli.plan.config import PlanningConfig
from tbptt_ckpt.cli.task import Task
from tbptt_ckpt.engine.parts import Parts
from tbptt_ckpt.executor import ReplayExecutor
from tbptt_ckpt.memory.sizes import format_bytes
from tbptt_ckpt.planner.fastest import quick_plan
from tbptt_ckpt.planner.ladder import Reach, Rung, budget_ladder, longest_windows, reach_ladder
from tbptt_ckpt.profiling.predicting import measure_workload
from tbptt_ckpt.profiling.sweep import Progress, Watch, unwatched
from tbptt_ckpt.schedule import FixedBytes
from tbptt_ckpt.schedule.forms import Form, FormSeconds
from tbptt_ckpt.schedule.plan import PredictedPlan

AnyExecutor = str | ReplayExecutor

MEASURED_STEPS = 256
_MEASURING_SECONDS = 1.6
_ROWS = 12  # of a table of reaches, about
_SEARCHED_STEPS = 20_000
HALF = "50%"  # of the free memory, where no budget is given
_BY_HAND = (
    *("state_bytes", "step_bytes", "leaf_bytes"),
    *("step_seconds", "call_seconds", "backward_ratio"),
)


@dataclass(frozen=True, slots=True)
class FoundCosts:
    """Costs, and what of.

    `form` is that of the measured steps, `forms` what the window takes in each that was weighed.
    """

    what: str
    costs: Costs
    form: Form = "auto"
    forms: FormSeconds = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanningOutcome:
    """A plan and what to hold it against."""

    config: PlanningConfig
    what: str  # the costs are those of
    costs: Costs
    steps: int
    budget_bytes: int | None
    plan: PredictedPlan
    retained: PredictedPlan  # keeps everything
    ladder: list[Rung]  # from a small budget to keeping everything


@dataclass(frozen=True, slots=True)
class ReachesWithin:
    """How far windows reach within a budget."""

    budget: str  # as it was given
    budget_bytes: int
    longest: dict[int, int]  # extra forwards: steps, planned or not
    reaches: list[Reach]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReachOutcome:
    """How far windows reach, for one or several budgets."""

    what: str
    costs: Costs
    tables: list[ReachesWithin]


def run_planning_job(
    config: PlanningConfig, watch: Watch = unwatched
) -> PlanningOutcome | ReachOutcome:
    """Find the costs and plan: one window and what other budgets buy, or a table of reaches."""
    config.check()
    watch(Progress("measuring costs", 0, 1))
    is_given = config.costs is not None or config.state_bytes is not None
    task = None if is_given else make_task(config)
    device = "cpu" if task is None else str(task.workload.device)
    if config.steps is None:
        found = _given_costs(config) if task is None else _costs_of(config, task)
        budgets = {
            text: budget_bytes(text, "--budget", device) or 0 for text in config.budget or (HALF,)
        }
        tables = [_reaches_within(text, size, found.costs, watch) for text, size in budgets.items()]
        return ReachOutcome(what=found.what, costs=found.costs, tables=tables)
    limit = budget_bytes(config.budget[0], "--budget", device) if config.budget else None

    def planned(costs: Costs) -> PredictedPlan:
        return _plan(config.steps, costs, limit, config.strategy)  # type: ignore[arg-type]

    found = _given_costs(config) if task is None else _costs_of(config, task, planned)
    watch(Progress("planning", 0, 1))
    costs, weighed = found.costs, tuple(found.forms.items())
    return PlanningOutcome(
        config=config,
        what=found.what,
        costs=costs,
        steps=config.steps,
        budget_bytes=limit,
        plan=replace(planned(costs), form=found.form, forms=weighed),
        retained=plan_steps(config.steps, costs, strategy="retain"),
        ladder=budget_ladder(config.steps, costs),
    )


def _plan(num_steps: int, costs: Costs, limit: int | None, strategy: Any) -> PredictedPlan:
    """The fastest plan, or about that where the search for the last call would take seconds."""
    if strategy == "optimal" and limit is not None and num_steps > _SEARCHED_STEPS:
        return quick_plan(num_steps, costs, limit)
    return plan_steps(num_steps, costs, budget_bytes=limit, strategy=strategy)


def _reaches_within(text: str, num_bytes: int, costs: Costs, watch: Watch) -> ReachesWithin:
    watch(Progress(f"looking how far {format_bytes(num_bytes)} reach", 0, _ROWS))
    try:
        longest = longest_windows(num_bytes, costs)
    except InfeasibleBudgetError as error:
        least = format_bytes(error.smallest_budget_bytes or 0)
        message = f"--budget {text}: not even one step fits into less than {least}"
        raise ArgumentError(message) from error
    found = ReachesWithin(text, num_bytes, longest, [])
    for reach in reach_ladder(num_bytes, costs, longest):
        found.reaches.append(reach)
        watch(Progress(f"planning within {format_bytes(num_bytes)}", len(found.reaches), _ROWS))
    return found


def _given_costs(config: PlanningConfig) -> FoundCosts:
    """Costs of a file, or by hand, with states as they are to be stored."""
    if config.costs is not None:
        what, costs = str(config.costs), _read_costs(config.costs)
    else:
        assert config.state_bytes is not None, "one of the two is given"
        assert config.step_bytes is not None, "both are given together"
        linear = {name: getattr(config, name) for name in _BY_HAND}
        fixed = FixedBytes(other=config.fixed_bytes)
        what, costs = "costs by hand", replace(Costs.linear(**linear), fixed=fixed)
    storage = config.replay().storage
    return FoundCosts(what, with_stored_states(storage, costs, torch.device("cpu")))


def _costs_of(
    config: PlanningConfig,
    task: Task,
    planned: Callable[[Costs], PredictedPlan] | None = None,
) -> FoundCosts:
    """Costs of a model, in the form that training takes for such a plan."""
    work, executor = task.workload, config.replay()
    what = f"{config.model} on {task.data}, measured on {work.device}"
    if planned is None or config.strategy != "optimal":  # then training weighs none
        return FoundCosts(what, measured_costs(work, config.steps or MEASURED_STEPS, executor))
    measured, parts = _measuring(work, config.steps or MEASURED_STEPS, executor)
    measured(0.0)  # a few first steps show which forms are open
    forms, batching = parts.runner.forms(), parts.runner.time_batching
    if len(forms) == 1:
        return FoundCosts(what, measured(_MEASURING_SECONDS), forms[0])
    costs, seconds = fastest_form(batching, forms, _MEASURING_SECONDS, measured, planned)
    return FoundCosts(what, costs, batching.form, seconds)


def measured_costs(work: Workload, steps: int, executor: AnyExecutor = "replay") -> Costs:
    """What windows of so many steps take, from short segments of the work."""
    measured, _ = _measuring(work, steps, executor)
    return measured(_MEASURING_SECONDS)


def _measuring(
    work: Workload, steps: int, executor: AnyExecutor
) -> tuple[Callable[[float], Costs], Parts]:
    """What measures the work's costs within some seconds, and whose steps it runs."""
    num_steps = min(max(steps, 2), MEASURED_STEPS)
    parts = work.engine(num_steps, num_steps, strategy="retain", executor=executor).parts
    room = AUTO_BUDGET.bytes_beside(0, work.device)

    def measured(seconds: float) -> Costs:
        limits = Limits(num_steps, seconds, room)
        return measure_workload(work, parts, num_steps, num_steps, limits)

    return measured, parts


def _read_costs(path: Path) -> Costs:
    """Costs from a file, which may be the whole output of `--json`."""
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArgumentError(f"--costs {path} is not JSON: {error}") from error
    if not isinstance(plain, dict):
        raise ArgumentError(f"--costs {path} holds {type(plain).__name__}, not an object")
    return Costs.from_dict(plain.get("costs", plain))
