"""What the user asked for, checked and ready to run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tbptt_ckpt.budget.amount import Budget, parse_budget
from tbptt_ckpt.budget.costed_plans import CostedPlans
from tbptt_ckpt.budget.fixed_plans import FixedPlans
from tbptt_ckpt.budget.planned_window import WindowPlans
from tbptt_ckpt.errors import ArgumentError, check_choice
from tbptt_ckpt.executor.checkpoint import CheckpointExecutor
from tbptt_ckpt.executor.losses import LossFunction
from tbptt_ckpt.executor.replay import ReplayExecutor
from tbptt_ckpt.executor.runner import Runner, make_runner
from tbptt_ckpt.executor.window_run import UNOBSERVED, Executor, Observer
from tbptt_ckpt.module.recurrence import (
    Recurrence,
    check_differentiable,
    check_initialised,
    device_of,
    parameters_of,
)
from tbptt_ckpt.schedule.actions import Action
from tbptt_ckpt.schedule.costs import Costs
from tbptt_ckpt.schedule.strategies import Auto, Optimal, Strategy, parse_strategy
from tbptt_ckpt.time_batching.policy import TimeBatching
from tbptt_ckpt.updates.accumulation import Accumulation
from tbptt_ckpt.updates.updater import Updater

_EXECUTORS: dict[str, Callable[[], Executor]] = {
    "replay": ReplayExecutor,
    "checkpoint": CheckpointExecutor,
}


@dataclass(slots=True)
class Settings:
    """Checked settings of a run; see `TBPTT` for their meaning."""

    recurrence: Recurrence
    loss_function: LossFunction
    k1: int
    k2: int | None
    loss: str
    reduction: str
    overlap: str
    plans: WindowPlans
    executor_name: str
    executor: Executor
    runner: Runner
    updater: Updater
    parameters: list[nn.Parameter]
    measure_memory: bool = False
    record: list[Action] | None = None
    observer: Observer = UNOBSERVED

    def weights(self) -> list[Tensor]:
        """All that an update changes: a function's weights are known to the optimizer only."""
        found = {id(p): p for p in (*self.parameters, *self.updater.optimized())}
        return list(found.values())

    @property
    def device_type(self) -> str:
        """Where the weights are; "cpu" where none are known."""
        weights = self.parameters or self.updater.optimized()
        return weights[0].device.type if weights else "cpu"

    @property
    def strategy(self) -> Strategy:
        """How schedules are chosen."""
        return self.plans.strategy

    @strategy.setter
    def strategy(self, strategy: Strategy) -> None:
        """From here on this fixed strategy, whatever was measured."""
        self.plans = FixedPlans(strategy)
        self.runner.time_batching.pays_off = True  # "auto" follows its rule


def make_executor(name: object) -> Executor:
    """The executor of that name."""
    check_choice("executor", name, tuple(_EXECUTORS))
    return _EXECUTORS[str(name)]()


def make_group(accumulate: int, reduction: str, optimizer: Any) -> Accumulation:
    """The windows that share an update."""
    group = Accumulation(accumulate, averages=reduction == "mean")
    if optimizer is None and accumulate != 1:
        raise ArgumentError(
            f"accumulate={accumulate} needs an optimizer; with optimizer=None the gradients of all "
            "windows accumulate in .grad"
        )
    return group


def make_plans(
    strategy: Strategy,
    budget: Budget | None,
    costs: Costs | None,
    *,
    executor: str,
    measured: bool,
    updater: Updater,
    parameters: list[nn.Parameter],
    batching: TimeBatching,
) -> WindowPlans:
    """Who plans the windows.

    Raises:
        ArgumentError: Costs of another kind. A budget, or the best plan within one, for nested
            checkpoints: they record the graph of a whole window, which no schedule bounds.
    """
    if costs is not None and not isinstance(costs, Costs):
        raise ArgumentError(f"costs={costs!r} must be Costs, as measure_costs gives them")
    finds_fastest = measured and isinstance(strategy, Auto | Optimal)
    if executor == "checkpoint":
        if budget is not None or isinstance(strategy, Optimal):
            raise ArgumentError(
                "executor='checkpoint' holds the graph of a whole window, which no memory_budget "
                "and no strategy='optimal' bounds; use executor='replay'"
            )
    elif finds_fastest or budget is not None:
        device = device_of(parameters)
        return CostedPlans(strategy, budget, costs, updater, parameters, device, batching)
    return FixedPlans(strategy)


def make_settings(
    module: object,
    loss_fn: Callable[[Any, Any], Any],
    k1: int,
    k2: int | None,
    optimizer: Any,
    *,
    loss: str,
    reduction: str,
    overlap: str,
    strategy: object,
    executor: str,
    per_step: bool | None,
    time_dim: int,
    clip_grad_norm: float | None,
    autocast_dtype: torch.dtype | None,
    scaler: Any,
    scheduler: Any,
    lane_dim: int | None = None,
    time_batching: object = "auto",
    accumulate: int = 1,
    memory_budget: object = None,
    costs: Costs | None = None,
    measure_memory: bool = False,
    measured: bool = False,
) -> Settings:
    """Check every argument and build what runs.

    `measured` says whether costs may be measured, which a single window is not worth.
    """
    check_choice("loss", loss, ("new", "last"))
    check_choice("reduction", reduction, ("mean", "sum"))
    check_choice("overlap", overlap, ("refresh", "stale"))
    group = make_group(accumulate, reduction, optimizer)
    runner = make_runner(module, per_step, time_dim, autocast_dtype, lane_dim)
    runner.time_batching = TimeBatching(time_batching, module)
    check_differentiable(module)
    check_initialised("loss_fn", loss_fn)
    parameters = parameters_of(module, loss_fn)
    updater = Updater(optimizer, parameters, clip_grad_norm, scaler, scheduler, group)
    plans = make_plans(
        parse_strategy(strategy),
        parse_budget(memory_budget),
        costs,
        executor=executor,
        measured=measured,
        updater=updater,
        parameters=parameters,
        batching=runner.time_batching,
    )
    return Settings(
        recurrence=runner.recurrence,
        loss_function=LossFunction(loss_fn),
        k1=k1,
        k2=k2,
        loss=loss,
        reduction=reduction,
        overlap=overlap,
        plans=plans,
        executor_name=executor,
        executor=make_executor(executor),
        runner=runner,
        updater=updater,
        parameters=parameters,
        measure_memory=measure_memory,
    )
