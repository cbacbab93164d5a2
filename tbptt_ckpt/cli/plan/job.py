"""Plans one window from measured or given costs."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tbptt_ckpt import Costs, Plan, measure_costs
from tbptt_ckpt import plan as plan_steps
from tbptt_ckpt.cli.bytes.contract import VOCAB_SIZE, check_model, initial_state, is_per_step
from tbptt_ckpt.cli.bytes.models import build_model
from tbptt_ckpt.cli.bytes.score import byte_loss
from tbptt_ckpt.cli.devices import DTYPES, autocast_dtype, find_device
from tbptt_ckpt.errors import ArgumentError, check_positive_int
from tbptt_ckpt.memory.sizes import parse_bytes
from tbptt_ckpt.planner.ladder import Rung, budget_ladder
from tbptt_ckpt.schedule import FixedBytes

MEASURED_STEPS = 256
DEFAULT_MODEL = "lstm"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanningConfig:
    """Options of `tbptt-ckpt plan`; sizes as text such as "512MiB".

    Attributes:
        steps: Steps a window reaches back.
        budget: Peak of device memory; None sets no limit.
        strategy: `optimal` or a fixed strategy.
        model: What to measure; None where costs are given.
        hidden, layers, lanes, device, dtype: As for training.
        costs: A JSON file with costs.
        state_bytes, step_bytes, leaf_bytes, fixed_bytes: Costs by hand.
        step_seconds, call_seconds, backward_ratio: Times by hand.
    """

    steps: int = 1000
    budget: str | None = None
    strategy: str = "optimal"
    model: str | None = None
    hidden: int = 192
    layers: int = 1
    lanes: int = 32
    device: str | None = None
    dtype: str = "float32"
    costs: Path | None = None
    state_bytes: str | None = None
    step_bytes: str | None = None
    leaf_bytes: str = "0"
    fixed_bytes: str = "0"
    step_seconds: float = 1e-3
    call_seconds: float = 0.0
    backward_ratio: float = 2.0

    def check(self) -> None:
        """Raise `ArgumentError` for options that cannot work, before anything is measured."""
        for name in ("steps", "hidden", "layers", "lanes"):
            check_positive_int(f"--{name}", getattr(self, name))
        if self.dtype not in DTYPES:
            raise ArgumentError(f"--dtype {self.dtype} is not one of {', '.join(DTYPES)}")
        if (self.state_bytes is None) != (self.step_bytes is None):
            raise ArgumentError("--state-bytes and --step-bytes are given together or not at all")
        for name in ("step_seconds", "call_seconds", "backward_ratio"):
            value, option = getattr(self, name), f"--{name.replace('_', '-')}"
            if not 0 <= value < float("inf"):
                raise ArgumentError(f"{option} {value} must be a finite number of at least 0")
        ways = {
            "--model": self.model,
            "--costs": self.costs,
            "--state-bytes": self.state_bytes,
        }
        given = [option for option, value in ways.items() if value is not None]
        if len(given) > 1:
            raise ArgumentError(f"{' and '.join(given)} are different ways to say what steps take")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanningOutcome:
    """A plan and what to hold it against.

    Attributes:
        config: The options.
        what: What the costs are those of.
        budget_bytes: The budget, None for no limit.
        costs: The costs.
        plan: The plan.
        retained: The plan that keeps everything.
        ladder: Plans from the smallest budget to keeping everything.
    """

    config: PlanningConfig
    what: str
    budget_bytes: int | None
    costs: Costs
    plan: Plan
    retained: Plan
    ladder: list[Rung]


def run_planning_job(config: PlanningConfig) -> PlanningOutcome:
    """Find the costs, plan, and plan for other budgets too.

    Raises:
        ArgumentError: An option that cannot work.
        InfeasibleBudgetError: A budget that no schedule, or not the fixed one, meets.
    """
    config.check()
    budget = None if config.budget is None else parse_bytes(config.budget, "--budget")
    what, costs = _costs(config)
    return PlanningOutcome(
        config=config,
        what=what,
        budget_bytes=budget,
        costs=costs,
        plan=plan_steps(config.steps, costs, budget_bytes=budget, strategy=config.strategy),
        retained=plan_steps(config.steps, costs, strategy="retain"),
        ladder=budget_ladder(config.steps, costs),
    )


def _costs(config: PlanningConfig) -> tuple[str, Costs]:
    if config.costs is not None:
        return str(config.costs), _read_costs(config.costs)
    if config.state_bytes is not None and config.step_bytes is not None:
        return "costs by hand", _costs_by_hand(config, config.state_bytes, config.step_bytes)
    model = config.model or DEFAULT_MODEL
    device = find_device(config.device)
    what = f"{model}, {config.lanes} lanes, {config.dtype}, measured on {device}"
    return what, measure_model(model, config, device)


def _costs_by_hand(config: PlanningConfig, state_bytes: str, step_bytes: str) -> Costs:
    by_hand = Costs.linear(
        state_bytes=parse_bytes(state_bytes, "--state-bytes"),
        step_bytes=parse_bytes(step_bytes, "--step-bytes"),
        leaf_bytes=parse_bytes(config.leaf_bytes, "--leaf-bytes"),
        step_seconds=config.step_seconds,
        call_seconds=config.call_seconds,
        backward_ratio=config.backward_ratio,
    )
    return replace(
        by_hand, fixed=FixedBytes(other=parse_bytes(config.fixed_bytes, "--fixed-bytes"))
    )


def _read_costs(path: Path) -> Costs:
    """Costs from a file, which may be the whole output of `--json`."""
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArgumentError(f"--costs {path} is not JSON: {error}") from error
    if not isinstance(plain, dict):
        raise ArgumentError(f"--costs {path} holds {type(plain).__name__}, not an object")
    return Costs.from_dict(plain.get("costs", plain))


def measure_model(name: str, config: PlanningConfig, device: torch.device) -> Costs:
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
