"""`measure_costs`: what the user's module takes, for plans made outside of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from tbptt_ckpt.arguments import AboveZero, Dimension, checked
from tbptt_ckpt.budget.amount import MemoryBudget, budget_bytes
from tbptt_ckpt.budget.calibrate import calibrate
from tbptt_ckpt.budget.lengths import Limits
from tbptt_ckpt.budget.probe import SegmentProbe
from tbptt_ckpt.budget.update_bytes import update_bytes
from tbptt_ckpt.data.blocks import StepBlock
from tbptt_ckpt.data.tensors import TensorSequence
from tbptt_ckpt.devices import check_on_one, device_of
from tbptt_ckpt.executor.boundary import Boundary
from tbptt_ckpt.executor.losses import LossFunction
from tbptt_ckpt.executor.replay import ReplayExecutor, storage_of
from tbptt_ckpt.executor.runner import make_runner
from tbptt_ckpt.memory.libraries import library_bytes
from tbptt_ckpt.memory.storages import tensor_bytes
from tbptt_ckpt.module.ambient import Ambient
from tbptt_ckpt.module.recurrence import (
    check_differentiable,
    parameters_of,
    recognise,
    time_of,
)
from tbptt_ckpt.module.trees import tensors_of
from tbptt_ckpt.schedule.costs import Costs, FixedBytes
from tbptt_ckpt.time_batching.policy import TimeBatchingChoice
from tbptt_ckpt.updates.delivery import Deliveries
from tbptt_ckpt.updates.updater import AnyOptimizer, Updater


@checked
def measure_costs(
    module: Callable[..., Any],
    loss_fn: Callable[[Any, Any], Any],
    inputs: Any,
    targets: Any,
    init_state: Any = None,
    *,
    optimizer: AnyOptimizer | None = None,
    weight: Tensor | None = None,
    clip_grad_norm: AboveZero | None = None,
    per_step: bool | None = None,
    time_dim: Dimension | None = None,
    autocast_dtype: torch.dtype | None = None,
    time_batching: TimeBatchingChoice = "auto",
    memory: MemoryBudget = None,
    max_seconds: AboveZero = 1.6,
    executor: Literal["replay"] | ReplayExecutor = "replay",
) -> Costs:
    """Measure what a module takes in bytes and seconds, for `plan`.

    Runs segments of 1, 2, 4, ... steps of the given data with their gradients: few, short and
    warm. Weights are only read; gradients, buffers, generators and the optimizer are as before
    at the end, bit by bit. What was done is logged under "tbptt_ckpt" at level INFO. Hooks of
    the module do fire, and attributes that it changes on itself stay changed.

    Args:
        module: As for `TBPTT`.
        loss_fn: As for `TBPTT`.
        inputs: Some steps of a window, nested tensors with time on `time_dim`. Some 64 are
            enough for the bytes; with as many as a window has, the time of longer leaves is
            measured rather than extrapolated.
        targets: The same.
        init_state: The state at the first step.
        optimizer: Whose state is counted, where it exists, and foreseen, where it does not.
        weight: [T] or [T, B], as for `TensorSequence`.
        clip_grad_norm: As for `TBPTT`.
        per_step: As for `TBPTT`.
        time_dim: As for `run_window`.
        autocast_dtype: As for `TBPTT`.
        time_batching: As for `TBPTT`.
        memory: Most bytes to take while measuring, besides what is there already; only
            segments of one step are run whatever they take.
        max_seconds: Time after which no longer segment is begun.
        executor: As for `TBPTT`: where a `ReplayExecutor` keeps states elsewhere or in fewer bits,
            `kept_bytes` is what is left in memory of one, and `store_seconds`, which leaves take
            more, the time of writing it and reading it again, measured now.

    Raises:
        ArgumentError: An argument that cannot work.
        TbpttError: Another profiler is active on this thread.
    """
    time_dim, recurrence = time_of(recognise(module, per_step, time_dim), time_dim, inputs)
    sequence = TensorSequence(inputs, targets, time_dim=time_dim, weight=weight)
    runner = make_runner(recurrence, autocast_dtype, time_batching, traces=True)
    check_differentiable(module)
    parameters = parameters_of(module, loss_fn)
    check_on_one("measure_costs", parameters)
    num_steps = len(sequence)
    block = StepBlock(
        0, num_steps, sequence.inputs, sequence.targets, sequence.weight, sequence.time_dim
    )
    tensors = [*parameters, *tensors_of(init_state), *tensors_of(sequence.inputs)]
    ambient = Ambient([module], tensors)
    probe = SegmentProbe(
        runner=runner,
        loss=LossFunction(loss_fn),
        blocks=[block],
        ambient=ambient,
        parameters=parameters,
        device=device_of(parameters),
        first=0,
        stop=num_steps,
        loss_start=0,
        boundary=Boundary(0, init_state, ambient.capture()),
    )
    room = budget_bytes(memory, "memory", device_of(parameters)) or float("inf")
    deliveries = Deliveries(module, loss_fn)
    deliveries.wrappers.begin()
    update = update_bytes(Updater(optimizer, parameters, clip_grad_norm, None, None))
    fixed = FixedBytes(
        weights=tensor_bytes(module, loss_fn),
        step_inputs=sum(t.nbytes for t in tensors_of([inputs, targets])) / num_steps,
        libraries=library_bytes(device_of(parameters)),
    )
    with deliveries.of(parameters):  # of nothing: no hook runs
        limits = Limits(num_steps, max_seconds, room)
        return calibrate(probe, limits, update, fixed, storage_of(executor))
