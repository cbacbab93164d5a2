"""What a window is foretold to take: the sum over its schedule of what short segments took.

The planner knows a leaf by its length alone, and errs on the safe side where leaves differ.
Here the schedule is known, so two things more are: which steps of a leaf have a loss, and
where the window cuts it into several calls of a segment module, whose workspaces follow each
other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise

from torch import Tensor

from tbptt_ckpt.budget.calibrate import Limits, calibrate
from tbptt_ckpt.budget.probe import SegmentProbe
from tbptt_ckpt.budget.update_bytes import update_bytes
from tbptt_ckpt.data.blocks import StepBlock
from tbptt_ckpt.engine.parts import Parts
from tbptt_ckpt.engine.results import WindowResult
from tbptt_ckpt.executor.boundary import Boundary
from tbptt_ckpt.memory.storages import tensor_bytes
from tbptt_ckpt.module.ambient import Ambient
from tbptt_ckpt.module.trees import tensors_of
from tbptt_ckpt.profiling.configuration import Configuration
from tbptt_ckpt.profiling.endless import EndlessSource
from tbptt_ckpt.profiling.leaf_parts import LeafParts, QuietProbe, loud_parts, quiet_parts
from tbptt_ckpt.profiling.report import ActionSpan
from tbptt_ckpt.profiling.work import Work
from tbptt_ckpt.schedule.actions import Advance, Differentiate, Drop, Keep
from tbptt_ckpt.schedule.costs import Costs, FixedBytes

_LENGTHS = (1, 2, 3, 5, 8, 13, 16, 21, 32, 34, 55, 64, 89)
_SECONDS = 0.6


@dataclass(frozen=True, slots=True)
class Foretold:
    """What a window was foretold to take.

    Attributes:
        peak_bytes: At its peak, everything included.
        action_bytes: At the peak of every action that runs steps.
    """

    peak_bytes: int
    action_bytes: tuple[int, ...]

    def fill_in(self, spans: Sequence[ActionSpan]) -> tuple[ActionSpan, ...]:
        """The spans with what was foretold for each."""
        foretold = iter(self.action_bytes)
        return tuple(
            replace(span, predicted_bytes=next(foretold)) if span.stop > span.start else span
            for span in spans
        )


@dataclass(frozen=True, slots=True)
class Forecast:
    """What segments of some work took, ready to foretell its windows.

    Attributes:
        costs: What states, advances and updates take, and what is fixed.
        loud: Leaves of steps with a loss.
        quiet: Leaves of steps without one.
        only_last: Whether only a window's last step has a loss.
        clears: Whether every window makes its gradients anew.
    """

    costs: Costs
    loud: LeafParts
    quiet: LeafParts
    only_last: bool
    clears: bool

    def of(self, window: WindowResult, configuration: Configuration) -> Foretold:
        """What a window was to take."""
        assert window.plan is not None, "a measured window has a loss"
        joints = _joints(window, configuration)
        costs = self.costs
        steps = window.stop - min(window.start, window.new_start)
        base = costs.fixed.total(steps) + len(joints) * costs.state_bytes
        if window.start < window.new_start:  # noted at the update points within reach
            k1 = configuration.k1
            base += (window.new_start // k1 - window.start // k1 + 1) * costs.ambient_bytes
        walk = _Walk(self, window, configuration, base)
        taken = []
        for action in window.plan.schedule:
            if isinstance(action, Keep):
                walk.kept.add(action.step)
            elif isinstance(action, Drop):
                walk.kept.discard(action.step)
            else:
                taken.append(walk.take(action))
        return Foretold(max([base + costs.update_bytes, *taken]), tuple(taken))


class _Walk:
    """The states at hand while a schedule is walked through."""

    def __init__(
        self, forecast: Forecast, window: WindowResult, configuration: Configuration, base: int
    ) -> None:
        assert window.plan is not None, "a measured window has a loss"
        self._forecast, self._window, self._base = forecast, window, base
        self._longest_call = window.plan.advance_steps
        next_start = window.stop + configuration.k1 - configuration.k2
        self._given = {min(window.start, window.new_start), *_joints(window, configuration)}
        self._cuts = sorted({window.start, window.new_start, next_start, *self._given})
        self._loss_start = window.stop - 1 if forecast.only_last else window.new_start
        # The first leaf makes the gradients, unless they accumulate over windows.
        self._missing = forecast.costs.fixed.gradients if forecast.clears else 0
        self._working: int | None = None
        self.kept: set[int] = set()

    def take(self, action: Advance | Differentiate) -> int:
        """Bytes at the peak of an action."""
        if isinstance(action, Differentiate):
            if self._working != action.start:
                self._working = None
            extra, self._missing = self._leaf(action), 0
            held = self._held()
            self._working = None
        else:
            length = min(action.stop - action.start, self._longest_call)
            is_quiet = action.stop <= self._loss_start
            parts = self._forecast.quiet if is_quiet else self._forecast.loud
            extra = parts.advance(length) - self._missing
            held = self._held()
            self._working = None if action.stop in self._given else action.stop
        return self._base + held * self._forecast.costs.state_bytes + math.ceil(extra)

    def _held(self) -> int:
        own = self._working is not None and self._working not in self.kept
        return len(self.kept) + own

    def _leaf(self, leaf: Differentiate) -> float:
        """Pieces are run in order and differentiated from the last, each with all before it."""
        graph = peak = 0.0
        for start, stop in self._pieces(leaf.start, leaf.stop):
            parts = self._forecast.loud if start >= self._loss_start else self._forecast.quiet
            is_first = stop == self._window.stop
            graph += parts.graph(stop - start)
            work = parts.first_work if is_first else parts.work
            peak = max(peak, graph + work(stop - start))
        return peak

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        cuts = [cut for cut in {*self._cuts, self._loss_start} if start < cut < stop]
        edges = [start, *sorted(cuts), stop]
        yield from pairwise(edges)


def measure_forecast(work: Work, settings: Parts, configuration: Configuration) -> Forecast:
    """Run short segments of the work as its windows run them.

    Args:
        work: What to run; its gradients are left as they are.
        settings: Of the engine that runs its windows.
        configuration: Of these windows.
    """
    k1, k2 = configuration.k1, configuration.k2
    inputs, targets = EndlessSource(work.source, 0).read(0, k2)
    time_dim = getattr(work.source, "time_dim", 0)
    block = StepBlock(0, k2, inputs, targets, None, time_dim)
    tensors = [*settings.parameters, *tensors_of(work.init_state), *tensors_of(inputs)]
    ambient = Ambient([work.module, work.loss_fn], tensors)
    found = ambient.capture()

    only_last = work.options.get("loss") == "last"
    loss_steps = 1 if only_last else min(k1, k2)
    loud = SegmentProbe(
        runner=settings.runner,
        loss=settings.loss_function,
        blocks=[block],
        ambient=ambient,
        parameters=settings.parameters,
        device=work.device,
        first=0,
        stop=k2,
        loss_start=k2 - loss_steps,
        boundary=Boundary(0, work.init_state, found),
    )
    costs = calibrate(
        loud,
        Limits(k2, _SECONDS),
        update_bytes(settings.updater),
        FixedBytes(
            weights=tensor_bytes(work.module, work.loss_fn),
            step_inputs=tensor_bytes(inputs, targets) / k2,
        ),
    )
    if not costs.ambient_bytes:  # else each state has its own
        own = (work.module, work.loss_fn)
        noted = tensor_bytes(*own, found) - tensor_bytes(*own)
        costs = replace(costs, fixed=replace(costs.fixed, other=noted))
    with _gradients_put_back(settings.parameters):
        loud.go_on()
        with_loss = [loud.bytes_of(steps) for steps in _LENGTHS if steps <= loss_steps]
        quiet = QuietProbe(loud, settings)
        without = [quiet.bytes_of(steps) for steps in _LENGTHS if steps < k2]
    ambient.restore(found)
    parts = loud_parts(with_loss)
    return Forecast(
        costs=costs,
        loud=parts,
        quiet=quiet_parts(without) if without else parts,
        only_last=only_last,
        clears=work.optimizer is not None,
    )


@contextmanager
def _gradients_put_back(parameters: Sequence[Tensor]) -> Iterator[None]:
    grads = [parameter.grad for parameter in parameters]
    try:
        yield
    finally:
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad


def _joints(window: WindowResult, configuration: Configuration) -> list[int]:
    """Under stale overlap, the steps of recorded states from which blocks restart."""
    if configuration.overlap != "stale" or window.start >= window.new_start:
        return []
    k1 = configuration.k1
    first = (window.start // k1 + 1) * k1
    return list(range(first, window.new_start + 1, k1))
