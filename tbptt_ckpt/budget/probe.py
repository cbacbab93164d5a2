"""Leaves and advances of a few steps, run as a window runs them, for their bytes and seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from tbptt_ckpt.data.blocks import StepBlock
from tbptt_ckpt.executor.boundary import Boundary
from tbptt_ckpt.executor.guard import WeightGuard
from tbptt_ckpt.executor.losses import LossFunction
from tbptt_ckpt.executor.observer import Observer
from tbptt_ckpt.executor.replay import ReplayExecutor
from tbptt_ckpt.executor.resets import Resets
from tbptt_ckpt.executor.route import Route
from tbptt_ckpt.executor.runner import Runner
from tbptt_ckpt.executor.window_loss import WindowLoss
from tbptt_ckpt.executor.window_pass import StateGrads, WindowPass
from tbptt_ckpt.memory.malloc import malloc_bytes
from tbptt_ckpt.memory.meter import PeakMeter, peak_memory
from tbptt_ckpt.memory.storages import tensor_bytes
from tbptt_ckpt.module.ambient import Ambient, AmbientState
from tbptt_ckpt.schedule.actions import Action, Advance, Differentiate


@dataclass(frozen=True, slots=True)
class SegmentBytes:
    """What segments of some length take.

    Attributes:
        steps: Their length.
        last_leaf: Peak of a leaf before gradients exist, above what then is live.
        leaf: Peak of a leaf afterwards, above what then is live.
        advance: Peak of an advance.
        gradients: Gradients of weights.
        state_gradients: Gradients of a state.
        graph: Tensors of a leaf's graph.
        peak: The highest of all, above what was live before.
    """

    steps: int
    last_leaf: int
    leaf: int
    advance: int
    gradients: int
    state_gradients: int
    graph: int
    peak: int


@dataclass(frozen=True, slots=True)
class SegmentSeconds:
    """How long segments of some length take."""

    steps: int
    leaf: float
    advance: float

    def least(self, other: SegmentSeconds) -> SegmentSeconds:
        """The shorter times of two samples of one length."""
        return SegmentSeconds(
            self.steps, min(self.leaf, other.leaf), min(self.advance, other.advance)
        )


@dataclass(slots=True)
class SegmentProbe:
    """Runs segments at a window's end, where its losses are, each from the same state.

    Gradients of weights are made anew and left behind; generators and buffers move on.

    Attributes:
        runner: Calls the module.
        loss: The loss function.
        blocks: The steps `[first, stop)`.
        ambient: Generators and buffers.
        parameters: The weights.
        device: Where memory is measured.
        first: First step.
        stop: End.
        loss_start: First step with a loss.
        boundary: The state that segments start from, whatever step it is of.
        resets: Lanes that begin a new sequence.
    """

    runner: Runner
    loss: LossFunction
    blocks: Sequence[StepBlock]
    ambient: Ambient
    parameters: Sequence[nn.Parameter]
    device: torch.device
    first: int
    stop: int
    loss_start: int
    boundary: Boundary
    resets: Resets = field(default_factory=Resets)
    _arrived: Callable[[], None] = field(default=lambda: None)

    def bytes_of(self, steps: int) -> SegmentBytes:
        """Measure both kinds of leaf, and an advance."""
        self.forget_gradients()
        graphs: list[int] = []
        with peak_memory(self.device, held=(), rss=False) as meter:
            self._arrived = lambda: graphs.append(_now(meter))
            actions = (self._leaf(steps), self._leaf(steps), self._advance(steps))
            laps = [meter.lap()]
            state_grads = self._run(steps, actions, lambda: laps.append(meter.lap()))
            gradients, state_gradients = self._gradient_bytes(state_grads)
        self._arrived = lambda: None
        begun, last, leaf, advance = laps
        return SegmentBytes(
            steps=steps,
            last_leaf=last.peak_bytes - begun.now_bytes,
            leaf=leaf.peak_bytes - last.now_bytes,
            advance=advance.peak_bytes - leaf.now_bytes,
            gradients=gradients,
            state_gradients=state_gradients,
            graph=graphs[0] - begun.now_bytes,
            peak=meter.peak_bytes,
        )

    def advance_bytes_of(self, steps: int) -> int:
        """Peak of an advance, which may be longer than any leaf that fits."""
        with peak_memory(self.device, held=(), rss=False) as meter:
            self._run(steps, (self._advance(steps),), lambda: None)
        return meter.peak_bytes

    def seconds_of(self, steps: int) -> SegmentSeconds:
        """Time a leaf and an advance."""
        times = [self._now()]
        actions = (self._leaf(steps), self._advance(steps))
        self._run(steps, actions, lambda: times.append(self._now()))
        return SegmentSeconds(steps, times[1] - times[0], times[2] - times[1])

    def host_bytes_of(self, sample: SegmentBytes) -> int | None:
        """Host memory of a leaf's graph besides its tensors; None where nobody says."""
        found: list[int | None] = []
        self._arrived = lambda: found.append(malloc_bytes())
        before = malloc_bytes()
        self._run(sample.steps, (self._leaf(sample.steps),), lambda: None)
        self._arrived = lambda: None
        if before is None or found[0] is None:
            return None
        on_host = sample.graph if self.device.type == "cpu" else 0
        return max(0, found[0] - before - on_host)

    def once_made_bytes(self) -> int:
        """Gradients of weights that a leaf makes once, however many steps it has."""
        batched = self.runner.time_batching.takes
        return tensor_bytes([p for p in self.parameters if p.requires_grad and batched(p)])

    def go_on(self) -> AmbientState:
        """Start from the state one step later; the generators and buffers there before."""
        before = self.ambient.capture()
        stop = self.first + 1
        step = self._pass(self.first, stop, stop, stop, Observer())
        reached = step.advance(self._boundary_at(self.first), stop, 1)
        self.boundary = reached
        return before

    def forget_gradients(self) -> None:
        """Make the next leaf the first that has gradients to make."""
        for parameter in self.parameters:
            parameter.grad = None

    def _leaf(self, steps: int) -> Action:
        return Differentiate(self.stop - steps, self.stop)

    def _advance(self, steps: int) -> Action:
        return Advance(self.stop - steps, self.stop)

    def _boundary_at(self, step: int) -> Boundary:
        return Boundary(step, self.boundary.state, self.boundary.ambient)

    def _run(
        self, steps: int, actions: Sequence[Action], after: Callable[[], None]
    ) -> StateGrads | None:
        def watched() -> Iterator[Action]:
            for action in actions:
                yield action
                after()

        start = self.stop - steps
        this = self._pass(start, start, self.stop, max(start, self.loss_start), _Arrived(self))
        route = Route(watched(), steps)
        return ReplayExecutor().run(this, route, self._boundary_at(start))

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
            loss=_UndividedLoss(self.loss, 1.0, "sum"),
            guard=WeightGuard(self.parameters),
            resets=self.resets,
            observer=observer,
        )

    def _gradient_bytes(self, state_grads: StateGrads | None) -> tuple[int, int]:
        weights = [p.grad for p in self.parameters if p.grad is not None]
        return tensor_bytes(weights), tensor_bytes(state_grads)

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()


def _now(meter: PeakMeter) -> int:
    meter.flush()
    return meter.net_bytes


class _Arrived(Observer):
    def __init__(self, probe: SegmentProbe) -> None:
        self._probe = probe

    def arrives(self, *_: object) -> None:
        self._probe._arrived()


class _UndividedLoss(WindowLoss):
    """The loss of steps that may all be masked, which takes memory all the same."""

    def is_empty(self) -> bool:
        return False


def kept_bytes(later: Boundary, earlier: AmbientState) -> int:
    """What keeping a state takes, with the generators and buffers that an earlier one lacks."""
    ambient = later.ambient
    if ambient is earlier:
        return tensor_bytes(later.state)
    drawn = (ambient.cpu_random, *ambient.device_random)
    before = (earlier.cpu_random, *earlier.device_random)
    own = [new for new, old in zip(drawn, before, strict=True) if new is not old]
    changed = zip(ambient.buffers, earlier.buffers, strict=True)
    # A value that is restored has a second tensor, to stand in the module.
    buffers = 2 * sum(new.values.nbytes for new, old in changed if new is not old)
    return tensor_bytes(later.state, own) + buffers
