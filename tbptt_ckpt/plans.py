"""The schedule of a whole window, from a strategy for stretches of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from tbptt_ckpt.schedule import (
    Action,
    Advance,
    Differentiate,
    Drop,
    Keep,
    Schedule,
    check_schedule,
    executed_steps,
    longest_leaf,
)
from tbptt_ckpt.strategies import Retain, Revolve, Sqrt, Step, Strategy, Uniform

_BUILT_IN = (Retain, Step, Uniform, Sqrt, Revolve)


@dataclass(frozen=True, slots=True)
class WindowPlan:
    """How one window is run.

    Attributes:
        strategy: The strategy's name.
        schedule: The actions.
        executed_steps: Module steps they run.
        longest_leaf: Steps of the longest leaf.
    """

    strategy: str
    schedule: Schedule
    executed_steps: int
    longest_leaf: int


def plan_window(
    strategy: Strategy, first: int, start: int, stop: int, joints: Sequence[int] = ()
) -> WindowPlan:
    """The plan of one window; arguments as in `window_actions`.

    Raises:
        ScheduleError: A user's schedule that does not differentiate the window.
    """
    schedule = Schedule(lambda: window_actions(strategy, first, start, stop, joints))
    if not isinstance(strategy, _BUILT_IN):
        check_schedule(schedule, first, start, stop, joints)
    return WindowPlan(str(strategy), schedule, executed_steps(schedule), longest_leaf(schedule))


def window_actions(
    strategy: Strategy, first: int, start: int, stop: int, joints: Sequence[int] = ()
) -> Iterator[Action]:
    """The schedule of one window.

    Args:
        strategy: How stretches are scheduled.
        first: Step of the window's first state; the steps up to `start` only advance.
        start: First step to differentiate.
        stop: End of the window.
        joints: Steps inside the window whose states are given (stale overlap). The blocks
            between them are scheduled one by one, the last first, since none of them needs
            the advance of the one before.
    """
    if isinstance(strategy, Retain):
        joints = ()  # one leaf, whatever lies inside
    edges = [start, *joints, stop]
    blocks = list(pairwise(edges))
    for block_start, block_stop in reversed(blocks):
        actions = strategy.actions(block_start, block_stop, stop - start)
        if first < block_start == start:
            actions = _after_advance(first, start, block_stop, actions)
        yield from actions


def _after_advance(
    first: int, start: int, stop: int, actions: Iterator[Action]
) -> Iterator[Action]:
    """Advance to `start`; keep the state there unless the only leaf begins with it."""
    yield Advance(first, start)
    action = next(actions)
    if action == Differentiate(start, stop):
        yield action
        return
    yield Keep(start)
    yield action
    yield from actions
    yield Drop(start)
