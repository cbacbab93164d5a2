"""Leaves and advances of a few steps, run as a window runs them, for their bytes and seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor

from tbptt_ckpt.budget.samples import JoinedBytes, Peaks, QuietSample, SegmentBytes
from tbptt_ckpt.data.blocks import StepBlock
from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.executor.boundary import Boundary
from tbptt_ckpt.executor.guard import WeightGuard
from tbptt_ckpt.executor.losses import LossFunction
from tbptt_ckpt.executor.observer import UNOBSERVED, Observer
from tbptt_ckpt.executor.replay import ReplayExecutor
from tbptt_ckpt.executor.resets import Resets
from tbptt_ckpt.executor.runner import Runner
from tbptt_ckpt.executor.sinks import Sink
from tbptt_ckpt.executor.window_loss import WindowLoss
from tbptt_ckpt.executor.window_pass import Route, StateGrads, WindowPass
from tbptt_ckpt.memory.meter import Lap, peak_memory
from tbptt_ckpt.memory.resident import malloc_bytes
from tbptt_ckpt.memory.storages import tensor_bytes
from tbptt_ckpt.module.ambient import Ambient
from tbptt_ckpt.module.recurrence import renormalised_in
from tbptt_ckpt.module.trees import tensors_of
from tbptt_ckpt.schedule.actions import Action, Advance, Differentiate


class ChangingStateError(ArgumentError):
    """What steps take cannot be measured, since their state grows or shrinks."""


@dataclass(slots=True)
class SegmentProbe:
    """Runs segments at a window's end, where its losses are, each from the same state.

    Gradients of weights are made anew and left behind; generators and buffers move on.
    """

    runner: Runner
    loss: LossFunction
    blocks: Sequence[StepBlock]  # the steps `[first, stop)`
    ambient: Ambient
    parameters: Sequence[Tensor]
    device: torch.device  # where memory is measured
    first: int
    stop: int
    loss_start: int  # first step with a loss
    boundary: Boundary  # the state that segments start from, whatever step it is of
    resets: Resets = field(default_factory=Resets)  # lanes that begin a new sequence
    checks_replays: bool = False  # whether what is measured is held against what it repeats
    stops_at: Sequence[int] = ()  # where the leaf that is last in time is cut, if it is

    def bytes_of(self, steps: int) -> SegmentBytes:
        """Measure both kinds of leaf, and an advance."""
        for parameter in self.parameters:  # the first leaf has gradients to make
            parameter.grad = None
        actions = (self._leaf(steps), self._leaf(steps), self._advance(steps))
        with peak_memory(self.device, held=(), rss=False) as meter:
            readings = _Readings(meter.lap)
            state_grads = self._run(actions, readings)
            weights = [p.grad for p in self.parameters if p.grad is not None]
            gradients, state_gradients = tensor_bytes(weights), tensor_bytes(state_grads)
        begun, last_forward, last, forward, leaf, advance = readings.found
        return SegmentBytes(
            steps=steps,
            last_leaf=self._last_as_cut(steps) or _peaks(begun, last_forward, last),
            leaf=_peaks(last, forward, leaf),
            advance=advance.peak_bytes - leaf.now_bytes,
            gradients=gradients,
            state_gradients=state_gradients,
            graph=last_forward.now_bytes - begun.now_bytes,
            peak=meter.peak_bytes,
        )

    def _last_as_cut(self, steps: int) -> Peaks | None:
        """Measure the leaf before gradients exist as it is cut; None where nothing cuts it."""
        if not any(step > self.stop - steps for step in self.stops_at):
            return None
        for parameter in self.parameters:
            parameter.grad = None
        with peak_memory(self.device, held=(), rss=False) as meter:
            readings = _Readings(meter.lap)
            self._run((self._leaf(steps),), readings, stops_at=self.stops_at)
        return _peaks(*readings.found)

    @property
    def num_steps(self) -> int:
        """Most steps of a segment."""
        return self.stop - self.first

    @property
    def may_be_irregular(self) -> bool:
        """Whether steps ask for it, or segments may be cut."""
        asks = any(b.resets is not None or b.weight is not None for b in self.blocks)
        return asks or self.runner.calls_segments

    def quiet_bytes_of(self, steps: int, *, joins: bool = True) -> QuietSample:
        """Measure an advance and a leaf of steps without a loss; one more step has it.

        `joins`: whether there is room for leaves in two pieces.
        """
        joint = self.stop - 1
        actions = (
            Advance(joint - steps, joint),
            Differentiate(joint, self.stop),
            Differentiate(joint - steps, joint),
        )
        with peak_memory(self.device, held=(), rss=False) as meter:
            readings = _Readings(meter.lap)
            self._run(actions, readings, loss_start=joint)
        before, advance, *_, begun, forward, leaf = readings.found
        return QuietSample(
            steps=steps,
            leaf=_peaks(begun, forward, leaf),
            graph=forward.now_bytes - begun.now_bytes,
            advance=advance.peak_bytes - before.now_bytes,
            joined=self._joined_bytes_of(steps) if joins and steps > 1 else None,
        )

    def _joined_bytes_of(self, steps: int) -> JoinedBytes | None:
        """Measure leaves in two pieces, whose gradients meet; a loop's steps are but one."""
        if not self.runner.calls_segments:
            return None
        for parameter in self.parameters:  # the first leaf has gradients to make
            parameter.grad = None
        with peak_memory(self.device, held=(), rss=False) as meter:
            readings = _Readings(meter.lap)
            joint = self.stop - 1
            self._run((self._leaf(steps), self._leaf(steps)), readings, joint, stops_at=(joint,))
        begun, last_forward, last, forward, leaf = readings.found
        anew = last.now_bytes - begun.now_bytes
        return JoinedBytes(
            last_leaf=max(0, _peaks(begun, last_forward, last).backward - anew),
            leaf=_peaks(last, forward, leaf).backward,
        )

    def advance_bytes_of(self, steps: int, *, has_losses: bool) -> int:
        """Peak of an advance, which may be longer than any leaf that fits."""
        loss_start = self.loss_start if has_losses else self.stop
        with peak_memory(self.device, held=(), rss=False) as meter:
            self._run((self._advance(steps),), UNOBSERVED, loss_start)
        return meter.peak_bytes

    def seconds_of(self, steps: int) -> tuple[float, float]:
        """How long a leaf takes, and an advance."""
        readings = _Readings(self._now)
        self._run((self._leaf(steps), self._advance(steps)), readings)
        begun, _, leaf, advance = readings.found
        return leaf - begun, advance - leaf

    def warm_up(self) -> None:
        """Run a leaf and an advance: libraries load kernels, and make what they keep, for good."""
        block = self.runner.block_steps
        for steps in {1, block} if block <= self.num_steps else {1}:
            self._run((self._leaf(steps), self._advance(steps)), UNOBSERVED)

    def host_bytes_of(self, sample: SegmentBytes) -> int | None:
        """Host memory of a leaf's graph besides its tensors; None where nobody says."""
        readings = _Readings(malloc_bytes)
        self._run((self._leaf(sample.steps),), readings)
        before, forward, _ = readings.found
        if before is None or forward is None:
            return None
        on_host = sample.graph if self.device.type == "cpu" else 0
        return max(0, forward - before - on_host)

    def once_made_bytes(self) -> int:
        """Gradients of weights that a leaf makes once, however many steps it has."""
        batched = self.runner.time_batching.takes
        return tensor_bytes([p for p in self.parameters if p.requires_grad and batched(p)])

    def go_on(self) -> Boundary:
        """Start from the state one step later; the one before, with what was there before."""
        before = Boundary(self.first, self.boundary.state, self.ambient.capture())
        later = self.step()
        if tensors_of(self.boundary.state):  # there are none in a first state None
            _check_same_shapes(self.boundary, later)
        self.boundary = later
        return before

    def step(self, sink: Sink | None = None) -> Boundary:
        """What the first step reaches, without a graph; its output goes to the sink."""
        stop = self.first + 1
        this = self._pass(self.first, stop, stop, stop, UNOBSERVED)
        return this.advance(self._boundary_at(self.first), stop, 1, sink)

    def _leaf(self, steps: int) -> Differentiate:
        return Differentiate(self.stop - steps, self.stop)

    def _advance(self, steps: int) -> Advance:
        return Advance(self.stop - steps, self.stop)

    def _boundary_at(self, step: int) -> Boundary:
        return Boundary(step, self.boundary.state, self.boundary.ambient)

    def _run(
        self,
        actions: Sequence[Advance | Differentiate],
        observer: Observer,
        loss_start: int | None = None,
        *,
        stops_at: Sequence[int] = (),
    ) -> StateGrads | None:
        """Run actions; losses begin where they do in the window, or where it is said."""
        start = min(action.start for action in actions)
        loss_start = self.loss_start if loss_start is None else loss_start
        this = self._pass(start, start, self.stop, max(start, loss_start), observer)
        this = replace(this, stops_at=stops_at)
        route = Route(actions, self.stop - start)
        try:
            return ReplayExecutor().run(this, route, self._boundary_at(start))
        except RuntimeError:  # two leaves from one state differ where steps change its shape
            end = this.advance(self._boundary_at(start), self.stop, self.stop - start)
            _check_same_shapes(self.boundary, end)
            raise

    def _pass(
        self, first: int, start: int, stop: int, loss_start: int, observer: Observer
    ) -> WindowPass:
        return WindowPass(
            blocks=self.blocks,
            first=first,
            start=start,
            stop=stop,
            loss_start=loss_start,
            ambient=self.ambient,
            runner=self.runner,
            loss=_UndividedLoss(self.loss, (), start, start, "sum"),
            guard=WeightGuard(self.parameters, renormalised_in(self.runner.recurrence.module)),
            resets=self.resets,
            observer=observer,
        )

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()


Reading = TypeVar("Reading")


class _Readings(Observer, Generic[Reading]):
    """Reads something as actions begin, when a leaf's graph is complete, and at the end.

    Args:
        read: Gives the reading.
    """

    def __init__(self, read: Callable[[], Reading]) -> None:
        self._read = read
        self.found: list[Reading] = []

    def begins(self, action: Action) -> None:
        """The action before has ended."""
        self.found.append(self._read())

    def differentiates(self) -> None:
        """A leaf's graph is complete."""
        self.found.append(self._read())

    def ends(self) -> None:
        """All is done."""
        self.found.append(self._read())


class _UndividedLoss(WindowLoss):
    """The loss of steps that may all be masked, which takes memory all the same."""

    @property
    def divisor(self) -> float:
        return 1.0

    def is_known_empty(self) -> bool:
        return False


def _peaks(begun: Lap, forward: Lap, leaf: Lap) -> Peaks:
    """A leaf's, above what was live as it began."""
    now = begun.now_bytes
    return Peaks(forward.peak_bytes - now, leaf.peak_bytes - now)


def _check_same_shapes(earlier: Boundary, later: Boundary) -> None:
    old, new = ([tuple(t.shape) for t in tensors_of(each.state)] for each in (earlier, later))
    if old != new:
        raise ChangingStateError(
            f"the state's tensors change from step to step, as {old} became {new}, so that no "
            "measured step stands for later ones"
        )
