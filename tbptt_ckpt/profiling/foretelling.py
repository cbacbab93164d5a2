"""What measured costs foretell for a window, by simulating the schedule it was run by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tbptt_ckpt.costs import Costs
from tbptt_ckpt.measured_costs import measure_costs
from tbptt_ckpt.profiling.configuration import Configuration
from tbptt_ckpt.profiling.endless import EndlessSource
from tbptt_ckpt.profiling.work import Work
from tbptt_ckpt.report import ActionSpan
from tbptt_ckpt.results import WindowResult
from tbptt_ckpt.simulator import simulate

_MEASURED_OPTIONS = ("per_step", "time_dim", "clip_grad_norm", "autocast_dtype")


def costs_of(work: Work, k2: int) -> Costs:
    """What the work's module takes, measured on the first steps of its data."""
    inputs, targets = EndlessSource(work.source, 0).read(0, k2)
    options = {name: work.options[name] for name in _MEASURED_OPTIONS if name in work.options}
    options.setdefault("time_dim", getattr(work.source, "time_dim", 0))
    return measure_costs(
        work.module,
        work.loss_fn,
        inputs,
        targets,
        work.init_state,
        optimizer=work.optimizer,
        **options,
    )


@dataclass(frozen=True, slots=True)
class Foretold:
    """What a window was foretold to take.

    Attributes:
        peak_bytes: At its peak, everything included.
        action_bytes: At the peak of every action that runs steps; empty where there are
            too many to tell apart.
    """

    peak_bytes: int
    action_bytes: tuple[int, ...]

    def fill_in(self, spans: Sequence[ActionSpan]) -> tuple[ActionSpan, ...]:
        """The spans with what was foretold for each."""
        running = [span for span in spans if span.stop > span.start]
        if len(running) != len(self.action_bytes):
            return tuple(spans)
        foretold = iter(self.action_bytes)
        return tuple(
            replace(span, predicted_bytes=next(foretold)) if span.stop > span.start else span
            for span in spans
        )


def foretell(window: WindowResult, configuration: Configuration, costs: Costs) -> Foretold:
    """Simulate the schedule of a window."""
    assert window.plan is not None, "a measured window has a loss"
    joints = _joints(window, configuration)
    simulation = simulate(
        window.plan.schedule,
        costs,
        given=joints,
        recorded_states=len(joints),
        advance_steps=window.plan.advance_steps,
    )
    *actions, _update = (num_bytes for _, num_bytes in simulation.timeline)
    return Foretold(simulation.peak_bytes, tuple(actions))


def _joints(window: WindowResult, configuration: Configuration) -> list[int]:
    """Under stale overlap, the steps of recorded states from which blocks restart."""
    if configuration.overlap != "stale" or window.start >= window.new_start:
        return []
    k1 = configuration.k1
    first = (window.start // k1 + 1) * k1
    return list(range(first, window.new_start + 1, k1))
