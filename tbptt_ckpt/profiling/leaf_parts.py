"""What the graph of a leaf holds and what differentiating it takes, with and without losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tbptt_ckpt.budget.probe import SegmentBytes, SegmentProbe
from tbptt_ckpt.engine.parts import Parts
from tbptt_ckpt.executor.boundary import Boundary
from tbptt_ckpt.executor.guard import WeightGuard
from tbptt_ckpt.executor.observer import Observer
from tbptt_ckpt.executor.replay import ReplayExecutor
from tbptt_ckpt.executor.route import Route
from tbptt_ckpt.executor.window_loss import WindowLoss
from tbptt_ckpt.executor.window_pass import WindowPass
from tbptt_ckpt.memory.meter import Lap, PeakMeter, peak_memory
from tbptt_ckpt.schedule.actions import Action, Advance, Differentiate
from tbptt_ckpt.schedule.costs import Curve


@dataclass(frozen=True, slots=True)
class LeafParts:
    """Bytes of a leaf by its length.

    Attributes:
        graph: What the graph holds when the leaf has been run.
        work: What differentiating takes besides.
        first_work: The same in a window's first leaf, which makes the gradients.
        advance: What running such steps without a graph takes.
    """

    graph: Curve
    work: Curve
    first_work: Curve
    advance: Curve


def loud_parts(samples: Sequence[SegmentBytes]) -> LeafParts:
    """Parts of leaves with losses, from segments of several lengths."""
    anew = samples[-1].gradients + samples[-1].state_gradients
    return LeafParts(
        graph=Curve.through((s.steps, s.graph) for s in samples),
        work=Curve.through((s.steps, max(0, s.leaf - s.graph)) for s in samples),
        first_work=Curve.through((s.steps, max(0, s.last_leaf - anew - s.graph)) for s in samples),
        advance=Curve.through((s.steps, s.advance) for s in samples),
    )


@dataclass(frozen=True, slots=True)
class QuietBytes:
    """What steps without a loss take; see `LeafParts`."""

    steps: int
    graph: int
    work: int
    advance: int


def quiet_parts(samples: Sequence[QuietBytes]) -> LeafParts:
    """Parts of leaves without losses, from what a `QuietProbe` found."""
    work = Curve.through((s.steps, s.work) for s in samples)
    return LeafParts(
        graph=Curve.through((s.steps, s.graph) for s in samples),
        work=work,
        first_work=work,
        advance=Curve.through((s.steps, s.advance) for s in samples),
    )


class QuietProbe(Observer):
    """Runs leaves whose steps have no loss: what follows them has, and gives a gradient.

    Args:
        probe: Of segments with a loss.
        settings: Of the engine.
    """

    def __init__(self, probe: SegmentProbe, settings: Parts) -> None:
        self._probe, self._settings = probe, settings
        self._meter: PeakMeter
        self._laps: list[Lap] = []

    def bytes_of(self, steps: int) -> QuietBytes:
        """Measure an advance and a leaf."""
        probe, stop = self._probe, self._probe.stop
        start, joint = stop - 1 - steps, stop - 1
        work = WindowPass(
            probe.blocks,
            start,
            start,
            stop,
            joint,
            probe.ambient,
            probe.runner,
            WindowLoss(self._settings.loss_function, 1.0, "sum"),
            WeightGuard(probe.parameters),
            observer=self,
        )
        first = Boundary(start, probe.boundary.state, probe.boundary.ambient)
        actions: list[Action] = [
            Advance(start, joint),
            Differentiate(joint, stop),
            Differentiate(start, joint),
        ]
        self._laps = []
        with peak_memory(probe.device, held=(), rss=False) as meter:
            self._meter = meter
            ReplayExecutor().run(work, Route(actions, 64), first)
        before, advanced, *_, begun, forward, ended = self._laps
        graph = forward.now_bytes - begun.now_bytes
        peak = max(forward.peak_bytes, ended.peak_bytes) - begun.now_bytes
        return QuietBytes(steps, graph, peak - graph, advanced.peak_bytes - before.now_bytes)

    def begins(self, action: Action) -> None:
        """An action begins."""
        self._laps.append(self._meter.lap())

    def differentiates(self) -> None:
        """A leaf's graph is complete."""
        self._laps.append(self._meter.lap())

    def ends(self) -> None:
        """All is done."""
        self._laps.append(self._meter.lap())
