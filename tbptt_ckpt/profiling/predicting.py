"""What a window is predicted to take: its schedule, simulated with costs measured once.

These are the costs that budgets rest on, and the same sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tbptt_ckpt.budget.calibrate import calibrate
from tbptt_ckpt.budget.lengths import Limits
from tbptt_ckpt.budget.probe import SegmentProbe
from tbptt_ckpt.budget.update_bytes import update_bytes
from tbptt_ckpt.data.blocks import StepBlock
from tbptt_ckpt.engine.initial_state import for_lanes
from tbptt_ckpt.engine.parts import Parts
from tbptt_ckpt.engine.results import WindowResult
from tbptt_ckpt.executor.boundary import Boundary
from tbptt_ckpt.executor.replay import storage_of
from tbptt_ckpt.memory.available import free_memory
from tbptt_ckpt.memory.exhausted import is_out_of_memory, release_memory
from tbptt_ckpt.memory.libraries import library_bytes
from tbptt_ckpt.memory.storages import tensor_bytes
from tbptt_ckpt.module.ambient import Ambient
from tbptt_ckpt.module.trees import tensors_of
from tbptt_ckpt.profiling.configuration import Configuration
from tbptt_ckpt.profiling.report import ActionSpan
from tbptt_ckpt.profiling.workload import EndlessSource, Workload
from tbptt_ckpt.schedule.actions import Advance
from tbptt_ckpt.schedule.costs import Costs, FixedBytes
from tbptt_ckpt.schedule.simulator import Simulation, simulate
from tbptt_ckpt.schedule.windows import joint_steps, noted_steps, recorded_steps

_SECONDS = 0.6
_ROOM = 2.0  # over the measured peak: a segment is run twice, beside gradients of its own


def measure_workload(
    work: Workload,
    parts: Parts,
    k1: int,
    num_steps: int,
    limits: Limits,
    cuts: Sequence[int] = (),
) -> Costs:
    """Run short segments of `num_steps` steps of the work as its windows run them.

    Its gradients are left as they are; `parts` are those of the engine that runs its windows, which
    cut segments so many steps before their ends.
    """
    inputs, targets = EndlessSource(work.source, 0).read(0, num_steps)
    time_dim = getattr(work.source, "time_dim", 0)
    tensors = [*parts.parameters, *tensors_of(work.init_state), *tensors_of(inputs)]
    owners = (work.module, work.loss_fn)
    ambient = Ambient(owners, tensors)
    found = ambient.capture()
    probe = SegmentProbe(
        runner=parts.runner,
        loss=parts.loss_function,
        blocks=[StepBlock(0, num_steps, inputs, targets, None, time_dim)],
        ambient=ambient,
        parameters=parts.parameters,
        device=work.device,
        first=0,
        stop=num_steps,
        loss_start=num_steps - (1 if work.has_only_last_loss else min(k1, num_steps)),
        boundary=Boundary(0, for_lanes(work.init_state, parts.runner.recurrence.lane_dim), found),
        stops_at=sorted(num_steps - cut for cut in cuts if cut < num_steps),
    )
    fixed = FixedBytes(
        weights=tensor_bytes(*owners),
        step_inputs=tensor_bytes(inputs, targets) / num_steps,
        libraries=library_bytes(work.device),
    )
    with parts.updater.deliveries.of(parts.parameters):  # of nothing: no hook runs
        update, storage = update_bytes(parts.updater), storage_of(parts.executor)
        costs = calibrate(probe, limits, update, fixed, storage)
    if not costs.ambient_bytes:  # else each state has its own
        noted = tensor_bytes(*owners, found) - tensor_bytes(*owners)
        costs = replace(costs, fixed=replace(costs.fixed, other=noted))
    if work.optimizer is None:  # gradients accumulate from window to window
        costs = replace(costs, last_leaf_bytes=None)
    return costs


def predicted(
    work: Workload,
    parts: Parts,
    window: WindowResult,
    configuration: Configuration,
    peak_bytes: int,
) -> tuple[Costs, Simulation] | None:
    """Costs, and what by them a window was to take that took `peak_bytes`.

    None where segments find no memory.

    No leaf is run that is longer than the window's own: the window may have had memory for these
    alone.
    """
    assert window.plan is not None, "a measured window has a loss"
    plan, room = window.plan, min(free_memory(work.device), _ROOM * peak_bytes)
    longest = plan.longest_leaf
    advances = (a.stop - a.start for a in plan.schedule if isinstance(a, Advance))
    advance_steps = min(plan.advance_steps, max(advances, default=0))
    num_steps = min(window.stop - window.first, max(longest + 1, advance_steps))
    limits = Limits(longest, _SECONDS, room, advance_steps, leaf_steps=longest)
    stale, k1, k2 = configuration.overlap == "stale", configuration.k1, configuration.k2
    stops = {window.new_start, *noted_steps(window, None, k1, k2, stale=stale)}
    cuts = [window.stop - stop for stop in stops]
    try:
        costs = measure_workload(work, parts, k1, num_steps, limits, cuts)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    else:
        only_last = work.has_only_last_loss
        return costs, _simulated(window, costs, configuration, only_last=only_last)
    release_memory()
    return None


def _simulated(
    window: WindowResult, costs: Costs, configuration: Configuration, *, only_last: bool
) -> Simulation:
    """A window with such costs; `only_last` says that no other step had a loss."""
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
        coming_bytes=0 if costs.last_leaf_bytes is None else costs.fixed.gradients,
    )


def with_predictions(
    spans: Sequence[ActionSpan], simulation: Simulation | None
) -> tuple[ActionSpan, ...]:
    """The spans with what was predicted for each; without it where there are very many."""
    if simulation is None:
        return tuple(spans)
    peaks = [peak_bytes for _, peak_bytes in simulation.timeline[:-1]]  # the update comes last
    if len(peaks) != sum(span.stop > span.start for span in spans):
        return tuple(spans)
    expected = iter(peaks)
    return tuple(
        replace(span, predicted_bytes=next(expected)) if span.stop > span.start else span
        for span in spans
    )
