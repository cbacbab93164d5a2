"""Plans one window from measured or given costs."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tbptt_ckpt import Costs, measure_costs
from tbptt_ckpt import plan as plan_steps
from tbptt_ckpt.cli.bytes.models import (
    VOCAB_SIZE,
    build_model,
    check_model,
    initial_state,
    is_per_step,
)
from tbptt_ckpt.cli.bytes.score import byte_loss
from tbptt_ckpt.cli.configs import PlanningConfig
from tbptt_ckpt.cli.devices import DTYPES, autocast_dtype, find_device
from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.planner.ladder import Rung, budget_ladder
from tbptt_ckpt.schedule import FixedBytes
from tbptt_ckpt.schedule.plan import PredictedPlan
from tbptt_ckpt.schedule.strategies import parse_strategy

MEASURED_STEPS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanningOutcome:
    """A plan and what to hold it against."""

    config: PlanningConfig
    what: str  # the costs are those of
    costs: Costs
    plan: PredictedPlan
    retained: PredictedPlan  # keeps everything
    ladder: list[Rung]  # from the smallest budget to keeping everything


def run_planning_job(config: PlanningConfig) -> PlanningOutcome:
    """Find the costs, plan, and plan for other budgets too."""
    config.check()
    what, costs = _costs(config)
    return PlanningOutcome(
        config=config,
        what=what,
        costs=costs,
        plan=plan_steps(
            config.steps,
            costs,
            budget_bytes=config.budget,
            strategy=parse_strategy(config.strategy),
        ),
        retained=plan_steps(config.steps, costs, strategy="retain"),
        ladder=budget_ladder(config.steps, costs),
    )


def _costs(config: PlanningConfig) -> tuple[str, Costs]:
    if config.costs is not None:
        return str(config.costs), _read_costs(config.costs)
    if config.state_bytes is not None and config.step_bytes is not None:
        by_hand = Costs.linear(
            state_bytes=config.state_bytes,
            step_bytes=config.step_bytes,
            leaf_bytes=config.leaf_bytes,
            step_seconds=config.step_seconds,
            call_seconds=config.call_seconds,
            backward_ratio=config.backward_ratio,
        )
        return "costs by hand", replace(by_hand, fixed=FixedBytes(other=config.fixed_bytes))
    model = config.model or "lstm"
    device = find_device(config.device)
    what = f"{model}, {config.lanes} lanes, {config.dtype}, measured on {device}"
    return what, _measured(model, config, device)


def _read_costs(path: Path) -> Costs:
    """Costs from a file, which may be the whole output of `--json`."""
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArgumentError(f"--costs {path} is not JSON: {error}") from error
    if not isinstance(plain, dict):
        raise ArgumentError(f"--costs {path} holds {type(plain).__name__}, not an object")
    return Costs.from_dict(plain.get("costs", plain))


def _measured(name: str, config: PlanningConfig, device: torch.device) -> Costs:
    """What a byte-level model takes on random bytes, with Adam."""
    module = build_model(name, hidden=config.hidden, layers=config.layers)
    module = module.to(device, DTYPES[config.dtype])
    shape = (min(max(config.steps, 2), MEASURED_STEPS), config.lanes)
    inputs, targets = (torch.randint(VOCAB_SIZE, shape, device=device) for _ in range(2))
    check_model(name, module, inputs[:2], config.lanes)
    return measure_costs(
        module,
        byte_loss,
        inputs,
        targets,
        initial_state(module, config.lanes),
        optimizer=torch.optim.Adam(module.parameters()),
        per_step=is_per_step(module),
        autocast_dtype=autocast_dtype(config.dtype),
    )
