"""The simulator: replays any schedule, action by action, and counts bytes, steps and seconds.

It is an account of its own: it knows nothing of how schedules are planned.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from tbptt_ckpt.arguments import Dimension, PositiveInt, checked
from tbptt_ckpt.errors import ScheduleError
from tbptt_ckpt.schedule.actions import Action, Advance, Differentiate, Drop, Keep, check_schedule
from tbptt_ckpt.schedule.costs import Costs

_CALL_STEPS = 64  # an advance is cut into calls of this length, or of the longest leaf's
_KEPT_POINTS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """What a schedule takes.

    Attributes:
        peak_bytes: Peak of device memory, everything included.
        seconds: Time.
        executed_steps: Module steps that run: advanced plus differentiated ones.
        advanced_steps: Those that run without a graph.
        num_leaves: Leaves.
        num_calls: Calls of a segment module, in advances and leaves.
        num_boundaries: The most states at once, those that leaves start from included, the
            window's first and given ones not.
        timeline: (seconds, bytes): the peak of each action at the time it begins. A long one
            is thinned; the peak is always there.
    """

    peak_bytes: int
    seconds: float
    executed_steps: int
    advanced_steps: int
    num_leaves: int
    num_calls: int
    num_boundaries: int
    timeline: tuple[tuple[float, int], ...] = field(repr=False)


@checked
def simulate(
    schedule: Iterable[Action],
    costs: Costs,
    *,
    given: Collection[int] = (),
    recorded_states: Dimension = 0,
    advance_steps: PositiveInt | None = None,
    loss_start: int | None = None,
    coming_bytes: Dimension = 0,
) -> Simulation:
    """Replay a schedule without running a module; takes time in proportion to its actions.

    Args:
        schedule: The actions of one window, the advance to its start included.
        costs: What steps and states take.
        given: Steps whose states exist without being kept (stale overlap).
        recorded_states: States that earlier windows left and that exist throughout.
        advance_steps: Most steps of one call in an advance; by default 64, or the longest
            leaf where that is longer.
        loss_start: The first step with a loss; None where every step has one.
        coming_bytes: Of the fixed part, what the first leaf makes, as it does gradients that were
            cleared. Plans count it from the start.

    Raises:
        ScheduleError: A schedule that does not differentiate one window.
    """
    actions = schedule if isinstance(schedule, Collection) else list(schedule)
    first, start, stop, longest = _extent(actions)
    check_schedule(actions, first, start, stop, given)
    if advance_steps is None:
        advance_steps = max(_CALL_STEPS, longest)
    base_bytes = costs.fixed.total(stop - first) + recorded_states * costs.state_bytes
    loss_start = first if loss_start is None else min(loss_start, stop)
    states = {first, *given}
    replay = _Replay(costs, stop, states, base_bytes, advance_steps, loss_start, coming_bytes)
    for action in actions:
        replay.take(action)
    return replay.finish()


def _extent(actions: Iterable[Action]) -> tuple[int, int, int, int]:
    """First step that runs, first one differentiated, end, and steps of the longest leaf."""
    first = start = math.inf
    stop = longest = 0
    for action in actions:
        if isinstance(action, Advance | Differentiate):
            first = min(first, action.start)
        if isinstance(action, Differentiate):
            start, stop = min(start, action.start), max(stop, action.stop)
            longest = max(longest, action.stop - action.start)
    if math.isinf(start):
        raise ScheduleError("the schedule differentiates nothing")
    return int(first), int(start), stop, longest


class _Replay:
    """The states at hand, and the clock."""

    def __init__(
        self,
        costs: Costs,
        stop: int,
        given: set[int],
        base_bytes: int,
        advance_steps: int,
        loss_start: int,
        coming_bytes: int,
    ) -> None:
        self.costs, self.stop, self.given, self.loss_start = costs, stop, given, loss_start
        self.base_bytes, self.advance_steps = base_bytes, advance_steps
        self.coming_bytes = coming_bytes
        self.kept: set[int] = set()
        self.working: int | None = None  # None too where it is a given state
        self.timeline: list[tuple[float, int]] = []
        self.seconds, self.peak_bytes = 0.0, base_bytes
        self.advanced = self.differentiated = self.leaves = self.calls = self.boundaries = 0

    def take(self, action: Action) -> None:
        """Do one action."""
        match action:
            case Advance(start, stop):
                self._advance(start, stop)
                self.working = None if stop in self.given else stop
            case Keep(step):
                self.kept.add(step)
            case Differentiate(start, stop):
                self._differentiate(start, stop)
                self.working = None
            case Drop(step):
                self.kept.discard(step)

    def finish(self) -> Simulation:
        """Update the weights; what it all took."""
        self._hold(self.costs.update_bytes)
        return Simulation(
            peak_bytes=self.peak_bytes,
            seconds=self.seconds,
            executed_steps=self.advanced + self.differentiated,
            advanced_steps=self.advanced,
            num_leaves=self.leaves,
            num_calls=self.calls,
            num_boundaries=self.boundaries,
            timeline=tuple(self.timeline),
        )

    def _num_losses(self, start: int, stop: int) -> int:
        return max(0, stop - max(start, self.loss_start))

    def _advance(self, start: int, stop: int) -> None:
        steps, losses = stop - start, self._num_losses(start, stop)
        taken = self.costs.advance_peak(steps, losses, self.advance_steps)
        self._hold(taken if self.leaves else taken - self.coming_bytes)
        self.advanced += steps
        whole, rest = divmod(steps, self.advance_steps)
        for count, call_steps in ((whole, self.advance_steps), (int(rest > 0), rest)):
            if count:
                self.seconds += count * self.costs.advance_seconds(call_steps)
                self.calls += count

    def _differentiate(self, start: int, stop: int) -> None:
        if self.working != start:
            self.working = None  # let go of before the leaf begins
        steps, losses = stop - start, self._num_losses(start, stop)
        self._hold(self.costs.leaf_peak(steps, losses, is_last=stop == self.stop))
        self.seconds += self.costs.leaf_seconds(steps)
        self.differentiated += steps
        self.leaves += 1
        self.calls += 1

    def _hold(self, action_bytes: int) -> None:
        """Take bytes for an action, beside the states at hand."""
        held = len(self.kept)
        held += self.working is not None and self.working not in self.kept
        self.boundaries = max(self.boundaries, held)
        now_bytes = self.base_bytes + held * self.costs.kept_state_bytes + action_bytes
        self.peak_bytes = max(self.peak_bytes, now_bytes)
        self.timeline.append((self.seconds, now_bytes))
        if len(self.timeline) >= 2 * _KEPT_POINTS:  # of neighbours the higher survives
            pairs = zip(self.timeline[::2], self.timeline[1::2], strict=True)
            self.timeline = [max(pair, key=lambda point: point[1]) for pair in pairs]
