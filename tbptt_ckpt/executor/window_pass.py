"""One pass of a window: its steps, its loss, what runs it, and how far it has come."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from tbptt_ckpt.data.blocks import StepBlock, narrow_blocks
from tbptt_ckpt.errors import shown
from tbptt_ckpt.executor.borders import Borders
from tbptt_ckpt.executor.boundary import Boundary, rejoined
from tbptt_ckpt.executor.guard import InputGuard, WeightGuard, advancing
from tbptt_ckpt.executor.loss_sum import LossSum
from tbptt_ckpt.executor.observer import UNOBSERVED, Observer
from tbptt_ckpt.executor.resets import Resets
from tbptt_ckpt.executor.runner import Runner
from tbptt_ckpt.executor.sinks import LossSink, Sink
from tbptt_ckpt.executor.window_loss import NO_LOSS, WindowLoss
from tbptt_ckpt.module.ambient import Ambient, AmbientState
from tbptt_ckpt.module.hooks import silent_hooks
from tbptt_ckpt.module.host import Numbers
from tbptt_ckpt.module.trees import (
    Tree,
    check_no_hidden_tensors,
    copy_containers,
    detach_state,
    state_as_leaves,
    tensors_of,
)
from tbptt_ckpt.schedule.actions import Action
from tbptt_ckpt.updates.collected import backward

StateGrads = list[Tensor | None]  # one per tensor of a state
Root = tuple[Tensor, Tensor | None]  # to differentiate, with its gradient; None stands for one


class Route:
    """The actions of one window as they were planned: an executor asks for the next.

    Attributes:
        advance_steps: Most steps of one call of a segment module in the advances to come.
    """

    def __init__(self, actions: Iterable[Action], advance_steps: int) -> None:
        self._actions, self.advance_steps = iter(actions), advance_steps

    def next_action(self) -> Action | None:
        """The next action, now that the last one is done; None at the end."""
        return next(self._actions, None)


@dataclass(slots=True)
class WindowPass:
    """One window being run.

    The part that is differentiated is `[start, stop)`. The losses are those of
    `[loss_start, stop)`, and those before `start` are constants.
    """

    blocks: Sequence[StepBlock]  # the steps, at least `[first, stop)`
    first: int  # first step that runs; smaller than `start` where new steps only advance
    start: int  # first step that is differentiated
    stop: int  # end of the window
    loss_start: int  # first step whose loss counts
    ambient: Ambient
    runner: Runner
    loss: WindowLoss = NO_LOSS
    guard: WeightGuard = field(default_factory=lambda: WeightGuard(()))
    grad_scale: float | Tensor = 1.0  # factor on the gradients, of a `GradScaler`
    stops_at: Sequence[int] = ()  # where runs are cut, in order, under every strategy
    # Generators and buffers to restore when a run begins at a step.
    ambients: Mapping[int, AmbientState] = field(default_factory=dict)
    # Recorded states from which steps restart, whatever the steps before gave.
    joints: Mapping[int, Boundary] = field(default_factory=dict)
    resets: Resets = field(default_factory=Resets)  # lanes that begin a new sequence
    wants_state_grads: bool = True  # whether the gradient of the state at `start` is asked for
    observer: Observer = UNOBSERVED
    # Told of each state in `stops_at`, or at `stop`, the first time a run ends there; the observer
    # hears of it after that.
    note: Callable[[int, Tree, AmbientState], None] = UNOBSERVED.arrives
    new_start: int = 0  # first step that no earlier window ran
    checks_replays: bool = False  # whether replays are held against what they repeat
    has_room: bool = False  # whether that may take the memory of a few steps
    # Called once all is differentiated, before any of the numbers that were asked for is read.
    completed: Callable[[], None] = UNOBSERVED.ends
    numbers: Numbers = field(default_factory=Numbers)
    # Where the gradient of the state is divided on its way back; runs are cut there too.
    borders: Borders = field(default_factory=lambda: Borders({}, Numbers()))
    executed_steps: int = 0  # module steps run so far
    # Steps that were run in one call of a segment module, by earlier windows too.
    calls: set[tuple[int, int]] = field(default_factory=set)
    _reached: int = 0  # end of the steps that have run
    inputs: InputGuard = field(init=False)
    _arrived: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.inputs = InputGuard(self.blocks)
        self.runner.parts.lapse()

    def run(
        self,
        start: int,
        stop: int,
        state: Tree,
        sink: Sink,
        longest: int | None = None,
        found: AmbientState | None = None,
    ) -> Tree:
        """Run `[start, stop)` from `state` and return the state at `stop`.

        No call of a segment module has more than `longest` steps; None sets no bound. The first
        step is to find what was recorded there, or else `found`, or else what is there.
        """
        with self.runner.region(stop - start, (state, self.blocks[0].inputs)):
            for begin, end in self._pieces(start, stop, longest):
                if begin != start:
                    state = self.rejoin(begin, state)
                state = self.borders.cross(begin, state)
                with self._enter(begin, end, found):
                    try:
                        state = self.runner.run(self.blocks, self.resets, begin, end, state, sink)
                    except Exception as error:
                        error.add_note(self._described(begin, end))
                        raise
                sink.close(begin, end)
                check_no_hidden_tensors(state)
                self._arrive(end, state)
                found = None
        return state

    def sink(self, *, graph: bool, looks_at: int = -1) -> LossSink:
        """A sink for the losses of a run, which is differentiated or not."""
        return LossSink(self.loss, self.start, self.loss_start, graph=graph, looks_at=looks_at)

    def advance(
        self, boundary: Boundary, stop: int, longest: int, sink: Sink | None = None
    ) -> Boundary:
        """Run from a boundary to `stop` without a graph, in calls of at most `longest` steps."""
        state = self.reach(boundary, stop, longest, sink or self.sink(graph=False))
        joint = self.joints.get(stop)
        return self.boundary(stop, state) if joint is None else joint

    def reach(self, boundary: Boundary, stop: int, longest: int, sink: Sink) -> Tree:
        """What such a run gives at `stop`, also where a recorded state stands there."""
        boundary.check_untouched()
        with advancing(), silent_hooks():
            state = copy_containers(boundary.state)
            state = self.run(boundary.step, stop, state, sink, longest, boundary.ambient)
        boundary.check_untouched()
        return state

    def rejoin(self, step: int, state: Tree) -> Tree:
        """The state from which `step` starts: the recorded one at a joint, else `state`."""
        joint = self.joints.get(step)
        return state if joint is None else rejoined(joint.state, state)

    def boundary(self, step: int, state: Tree) -> Boundary:
        """The state that was just reached at `step`, with what else is found there."""
        return Boundary(step, detach_state(state), self.ambient.capture(tensors_of(state)))

    def first_state(self, boundary: Boundary) -> Tree:
        """The state from which a leaf runs: new autograd leaves, where their gradient counts."""
        if boundary.step == self.start and not self.wants_state_grads:
            return copy_containers(boundary.state)
        return state_as_leaves(boundary.state)

    def roots(self, parts: Iterable[LossSum]) -> list[Root]:
        """What to differentiate: parts of the window's loss."""
        return [
            (losses.total, self._gradient_of(losses.total, losses.factor))
            for losses in parts
            if losses.total is not None and losses.total.requires_grad
        ]

    def _gradient_of(self, total: Tensor, factor: float) -> Tensor | None:
        """The gradient of the window's loss with respect to `total`, a part's sum over `factor`."""
        divisor = self.loss.divisor
        if isinstance(self.grad_scale, Tensor):  # as precise as below
            scaled = self.grad_scale.to(total.device).double() * factor
            return (scaled / divisor).to(total.dtype)
        scale = self.grad_scale * factor
        if not isinstance(divisor, float):
            return torch.full_like(total, scale) / divisor
        # torch makes the gradient one by itself, faster than it checks one that is given.
        return None if scale == divisor else torch.full_like(total, scale / divisor)

    def _pieces(self, start: int, stop: int, longest: int | None) -> Iterator[tuple[int, int]]:
        """Cut `[start, stop)` where states are noted, and into at most `longest` steps.

        A module that is compiled for each length is called over one length, and over single steps.
        """
        begin, block = start, self.runner.call_steps
        while begin < stop:
            position = bisect_right(self.stops_at, begin)
            end = self.stops_at[position] if position < len(self.stops_at) else stop
            end = min(end, stop, stop if longest is None else begin + longest)
            if block is not None:
                end = begin + (block if end - begin >= block else 1)
            yield begin, end
            begin = end

    def _enter(
        self, begin: int, end: int, found: AmbientState | None
    ) -> AbstractContextManager[None]:
        """The steps `[begin, end)` run next: find what they are to find, and count them."""
        found = self.ambients.get(begin, found)
        if found is not None:
            self.ambient.restore(found)
        self.ambient.about_to_run()
        self.executed_steps += end - begin
        if not self.runner.recurrence.per_step:
            self.calls.add((begin, end))
        is_again = begin < max(self._reached, self.new_start)
        self._reached = max(self._reached, end)
        return self.runner.counters.paused(is_again)

    def _described(self, begin: int, end: int) -> str:
        """What ran, for whoever reads an error of the user's module that names no step."""
        parts = list(narrow_blocks(self.blocks, begin, end))
        given = ([part.inputs for part in parts], [part.targets for part in parts])
        inputs, targets = (
            ", ".join(list(dict.fromkeys(map(shown, tensors_of(tree))))[:4]) or "none"
            for tree in given
        )
        return f"steps [{begin}, {end}) of the sequence ran: inputs {inputs}; targets {targets}"

    def _arrive(self, step: int, state: Tree) -> None:
        """Tell of a state the first time a run ends at `step`."""
        if step in self._arrived or (step != self.stop and step not in self.stops_at):
            return
        self._arrived.add(step)
        ambient = self.ambient.capture(tensors_of(state))
        self.note(step, state, ambient)
        self.observer.arrives(step, state, ambient)


def differentiate(roots: Sequence[Root]) -> None:
    """Add the gradients of roots that are differentiated together."""
    if roots:
        tensors, grads = zip(*roots, strict=True)
        backward(tensors, grads)


@runtime_checkable
class Executor(Protocol):
    """Runs schedules.

    Attributes:
        one_graph: Whether it records the graph of a whole window, so that no schedule bounds
            its memory and no block goes before an earlier one.
    """

    one_graph: bool

    def run(self, window: WindowPass, route: Route, first: Boundary) -> StateGrads | None:
        """Differentiate a window, from its first state on; gradients accumulate in `.grad`.

        Returns:
            The gradients of the state at the window's `start`, one per tensor; None if the
            window turned out to have no loss, in which case nothing was differentiated.
        """
        ...
