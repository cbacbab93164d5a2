"""What the user asked for, checked and ready to run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tbptt_ckpt.accumulation import Accumulation
from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.executor import (
    UNOBSERVED,
    CheckpointExecutor,
    Executor,
    Observer,
    ReplayExecutor,
)
from tbptt_ckpt.losses import LossFunction
from tbptt_ckpt.modules import Recurrence, check_differentiable, parameters_of, recognise
from tbptt_ckpt.runner import Runner
from tbptt_ckpt.schedule import Action
from tbptt_ckpt.sources import check_time_dim
from tbptt_ckpt.strategies import Strategy, parse_strategy
from tbptt_ckpt.time_batching import TimeBatching
from tbptt_ckpt.updates import Updater

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
    strategy: Strategy
    executor_name: str
    executor: Executor
    runner: Runner
    updater: Updater
    parameters: list[nn.Parameter]
    device_type: str
    record: list[Action] | None = None
    observer: Observer = UNOBSERVED

    def weights(self) -> list[Tensor]:
        """All that an update changes: a function's weights are known to the optimizer only."""
        found = {id(p): p for p in (*self.parameters, *self.updater.optimized())}
        return list(found.values())


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
    recurrence = recognise(module, per_step, time_dim, lane_dim)
    return Runner(recurrence, device_type_of(module), autocast_dtype)


def check_lane_dim(lane_dim: object) -> None:
    """Raise `ArgumentError` unless `lane_dim` is None or an int of at least 0."""
    if lane_dim is not None and (
        not isinstance(lane_dim, int) or isinstance(lane_dim, bool) or lane_dim < 0
    ):
        raise ArgumentError(f"lane_dim={lane_dim!r} must be an integer of at least 0, or None")


def device_type_of(module: object) -> str:
    """Where a module's weights are; "cpu" where it has none."""
    parameters = parameters_of(module)
    return parameters[0].device.type if parameters else "cpu"


def make_executor(name: object) -> Executor:
    """The executor of that name."""
    check_choice("executor", name, tuple(_EXECUTORS))
    return _EXECUTORS[str(name)]()


def check_memory_budget(memory_budget: object) -> None:
    """A byte budget needs a planner, which this version does not have."""
    if memory_budget is not None:
        raise ArgumentError(
            f"memory_budget={memory_budget!r} is not supported yet; choose a strategy such as "
            "'uniform:32' or 'revolve:20'"
        )


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
) -> Settings:
    """Check every argument and build what runs."""
    check_choice("loss", loss, ("new", "last"))
    check_choice("reduction", reduction, ("mean", "sum"))
    check_choice("overlap", overlap, ("refresh", "stale"))
    group = Accumulation(accumulate, averages=reduction == "mean")
    if optimizer is None and accumulate != 1:
        raise ArgumentError(
            f"accumulate={accumulate} needs an optimizer; with optimizer=None the gradients of all "
            "windows accumulate in .grad"
        )
    runner = make_runner(module, per_step, time_dim, autocast_dtype, lane_dim)
    runner.time_batching = TimeBatching(time_batching)
    check_differentiable(module)
    parameters = parameters_of(module, loss_fn)
    return Settings(
        recurrence=runner.recurrence,
        loss_function=LossFunction(loss_fn),
        k1=k1,
        k2=k2,
        loss=loss,
        reduction=reduction,
        overlap=overlap,
        strategy=parse_strategy(strategy),
        executor_name=executor,
        executor=make_executor(executor),
        runner=runner,
        updater=Updater(optimizer, parameters, clip_grad_norm, scaler, scheduler, group),
        parameters=parameters,
        device_type=device_type_of(module),
    )
