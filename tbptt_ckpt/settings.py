"""What the user asked for, checked and ready to run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tbptt_ckpt.accumulation import Accumulation
from tbptt_ckpt.budget import Budget, parse_budget
from tbptt_ckpt.costs import Costs
from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.executor import (
    UNOBSERVED,
    CheckpointExecutor,
    Executor,
    Observer,
    ReplayExecutor,
)
from tbptt_ckpt.losses import LossFunction
from tbptt_ckpt.modules import (
    Recurrence,
    check_autocast,
    check_differentiable,
    check_initialised,
    parameters_of,
    recognise,
)
from tbptt_ckpt.runner import Runner
from tbptt_ckpt.schedule import Action
from tbptt_ckpt.sources import check_time_dim
from tbptt_ckpt.strategies import Auto, Optimal, Strategy, parse_strategy
from tbptt_ckpt.time_batching import TimeBatching
from tbptt_ckpt.updates import Updater
from tbptt_ckpt.window_plans import CostedPlans, FixedPlans, WindowPlans

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


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise `ArgumentError` unless `value` is one of `choices`."""
    if value not in choices:
        options = " or ".join(repr(choice) for choice in choices)
        raise ArgumentError(f"{name}={value!r} must be {options}")


def make_runner(
    module: object,
    per_step: bool | None,
    time_dim: int,
    autocast_dtype: torch.dtype | None,
    lane_dim: int | None = None,
) -> Runner:
    """A runner for the user's module."""
    check_time_dim(time_dim)
    check_lane_dim(lane_dim)
    if autocast_dtype is not None and not (
        isinstance(autocast_dtype, torch.dtype) and autocast_dtype.is_floating_point
    ):
        raise ArgumentError(
            f"autocast_dtype={autocast_dtype!r} must be a floating dtype such as torch.bfloat16"
        )
    check_initialised("module", module)
    check_autocast(module, autocast_dtype)
    return Runner(recognise(module, per_step, time_dim, lane_dim), autocast_dtype)


def check_lane_dim(lane_dim: object) -> None:
    """Raise `ArgumentError` unless `lane_dim` is None or an int of at least 0."""
    if lane_dim is not None and (
        not isinstance(lane_dim, int) or isinstance(lane_dim, bool) or lane_dim < 0
    ):
        raise ArgumentError(f"lane_dim={lane_dim!r} must be an integer of at least 0, or None")


def device_of(parameters: list[nn.Parameter]) -> torch.device:
    """Where the weights are; the CPU where there are none."""
    return parameters[0].device if parameters else torch.device("cpu")


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
