"""What a window is predicted to take: its schedule, simulated with costs measured once.

These are the costs that budgets rest on, and the same sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tbptt_ckpt.budget.calibrate import Limits, calibrate
from tbptt_ckpt.budget.probe import SegmentProbe
from tbptt_ckpt.budget.update_bytes import update_bytes
from tbptt_ckpt.data.blocks import StepBlock
from tbptt_ckpt.engine.initial_state import for_lanes
from tbptt_ckpt.engine.parts import Parts
from tbptt_ckpt.engine.results import WindowResult
from tbptt_ckpt.executor.boundary import Boundary
from tbptt_ckpt.memory.storages import tensor_bytes
from tbptt_ckpt.module.ambient import Ambient
from tbptt_ckpt.module.trees import tensors_of
from tbptt_ckpt.profiling.configuration import Configuration
from tbptt_ckpt.profiling.report import ActionSpan
from tbptt_ckpt.profiling.workload import EndlessSource, Workload
from tbptt_ckpt.schedule.costs import Costs, FixedBytes
from tbptt_ckpt.schedule.simulator import Simulation, simulate
from tbptt_ckpt.schedule.windows import joint_steps, recorded_steps

_SECONDS = 0.6


def measure_workload(
    work: Workload, parts: Parts, k1: int, k2: int, max_seconds: float = _SECONDS
) -> Costs:
    """Run short segments of the work as its windows run them.

    Its gradients are left as they are; `parts` are those of the engine that runs its windows.
    """
    inputs, targets = EndlessSource(work.source, 0).read(0, k2)
    time_dim = getattr(work.source, "time_dim", 0)
    tensors = [*parts.parameters, *tensors_of(work.init_state), *tensors_of(inputs)]
    owners = (work.module, work.loss_fn)
    ambient = Ambient(owners, tensors)
    found = ambient.capture()
    probe = SegmentProbe(
        runner=parts.runner,
        loss=parts.loss_function,
        blocks=[StepBlock(0, k2, inputs, targets, None, time_dim)],
        ambient=ambient,
        parameters=parts.parameters,
        device=work.device,
        first=0,
        stop=k2,
        loss_start=k2 - (1 if work.has_only_last_loss else min(k1, k2)),
        boundary=Boundary(0, for_lanes(work.init_state, parts.runner.recurrence.lane_dim), found),
    )
    fixed = FixedBytes(
        weights=tensor_bytes(*owners), step_inputs=tensor_bytes(inputs, targets) / k2
    )
    with parts.updater.deliveries.of(parts.parameters):  # of nothing: no hook runs
        costs = calibrate(probe, Limits(k2, max_seconds), update_bytes(parts.updater), fixed)
    if not costs.ambient_bytes:  # else each state has its own
        noted = tensor_bytes(*owners, found) - tensor_bytes(*owners)
        costs = replace(costs, fixed=replace(costs.fixed, other=noted))
    if work.optimizer is None:  # gradients accumulate from window to window
        costs = replace(costs, last_leaf_bytes=None)
    return costs


def predict(
    window: WindowResult, costs: Costs, configuration: Configuration, *, only_last: bool
) -> Simulation:
    """What a window was to take; `only_last` says that no other step had a loss."""
    assert window.plan is not None, "a measured window has a loss"
    k1, k2, joints, other = configuration.k1, configuration.k2, range(0), costs.fixed.other
    if window.start < window.new_start:
        noted = recorded_steps(window, None, k1, k2, stale=True)  # under either overlap
        other += len(noted) * costs.ambient_bytes
        if configuration.overlap == "stale":
            joints = joint_steps(window, k1)
    return simulate(
        window.plan.schedule,
        replace(costs, fixed=replace(costs.fixed, other=other)),
        given=joints,
        recorded_states=len(joints),
        advance_steps=window.plan.advance_steps,
        loss_start=window.stop - 1 if only_last else window.new_start,
    )


def with_predictions(spans: Sequence[ActionSpan], simulation: Simulation) -> tuple[ActionSpan, ...]:
    """The spans with what was predicted for each; without it where there are very many."""
    peaks = [peak_bytes for _, peak_bytes in simulation.timeline[:-1]]  # the update comes last
    if len(peaks) != sum(span.stop > span.start for span in spans):
        return tuple(spans)
    predicted = iter(peaks)
    return tuple(
        replace(span, predicted_bytes=next(predicted)) if span.stop > span.start else span
        for span in spans
    )
