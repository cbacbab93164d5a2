"""A schedule is data: the ordered actions that differentiate one window.

One working state exists at any moment, besides the kept ones. An action that begins at
step s starts from the working state if that stands at s, otherwise from the state
kept at s. States that exist anyway (the window's first, and under stale overlap the
recorded ones) are *given* and need no `Keep`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, islice
from typing import NamedTuple, overload

from tbptt_ckpt.arguments import Dimension, checked
from tbptt_ckpt.errors import ScheduleError, shown

# Most steps of one call in an advance, unless a leaf is longer: outputs of a call exist at
# once, and calls of this length are no slower per step than longer ones.
ADVANCE_STEPS = 64


@dataclass(frozen=True, slots=True)
class Advance:
    """Run `[start, stop)` without recording a graph; the working state then stands at `stop`."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Keep:
    """Keep the working state, which stands at `step`, for later."""

    step: int


@dataclass(frozen=True, slots=True)
class Differentiate:
    """Run `[start, stop)` with a graph and differentiate it; no working state is left."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Drop:
    """Forget the state kept at `step`."""

    step: int


Action = Advance | Keep | Differentiate | Drop


class Counts(NamedTuple):
    """What a schedule comes to.

    Attributes:
        executed_steps: Module steps that run: advanced ones plus differentiated ones.
        num_boundaries: The most states at once while steps run, those that leaves start from
            included; the first one is given and not counted.
        num_levels: The most often that a step is advanced.
        num_leaves: Leaves.
        num_actions: Actions.
    """

    executed_steps: int
    num_boundaries: int
    num_levels: int
    num_leaves: int
    num_actions: int


class Schedule(Sequence[Action]):
    """Actions made on demand by a function, so that a long schedule takes no memory.

    Iterating is the cheap way to read one; `len` and indexing walk the actions.

    Args:
        make_actions: Called without arguments; each call returns a fresh iterator over
            the same actions.
        length: Their number, where it is known; otherwise it is counted when asked for.
    """

    @checked
    def __init__(
        self, make_actions: Callable[[], Iterator[Action]], length: Dimension | None = None
    ) -> None:
        self._make_actions = make_actions
        self._length = length

    def __iter__(self) -> Iterator[Action]:
        made = self._make_actions()
        if not isinstance(made, Iterator):
            raise ScheduleError(f"make_actions returned {shown(made)}, which is no iterator")
        return made

    def __len__(self) -> int:
        if self._length is None:
            self._length = sum(1 for _ in self)
        return self._length

    @overload
    def __getitem__(self, index: int) -> Action: ...
    @overload
    def __getitem__(self, index: slice) -> list[Action]: ...
    def __getitem__(self, index: int | slice) -> Action | list[Action]:
        positions = range(len(self))[index]
        if isinstance(positions, range):
            wanted = set(positions)
            found = {i: action for i, action in enumerate(self) if i in wanted}
            return [found[i] for i in positions]
        return next(islice(iter(self), positions, None))

    def placed(self, start: int) -> Iterator[Action]:
        """The same actions, `start` steps later."""
        return (moved(action, start) for action in self)

    @cached_property
    def counts(self) -> Counts:
        """What it comes to; the working state counts where it is not among the kept ones."""
        executed = states = leaves = actions = 0
        kept, changes, working = set[int](), Counter[int](), None
        for action in self:
            actions += 1
            match action:
                case Keep(step):
                    kept.add(step)
                case Drop(step):
                    kept.discard(step)
                case Advance(start, stop):
                    states = max(states, len(kept) + (working is not None and working not in kept))
                    executed, working = executed + stop - start, stop
                    changes.update({start: 1, stop: -1})
                case Differentiate(start, stop):
                    states = max(states, len(kept) + (working == start and start not in kept))
                    executed, working, leaves = executed + stop - start, None, leaves + 1
        levels = max(accumulate(change for _, change in sorted(changes.items())), default=0)
        return Counts(executed, states, levels, leaves, actions)

    @property
    def longest_leaf(self) -> int:
        """Steps of the longest leaf."""
        return max((a.stop - a.start for a in self if isinstance(a, Differentiate)), default=0)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = ", ".join(repr(action) for action in islice(iter(self), 6))
        return f"Schedule([{shown}{', ...' if len(self) > 6 else ''}], len={len(self)})"


def moved(action: Action, offset: int) -> Action:
    """The same action, `offset` steps later."""
    if isinstance(action, Keep | Drop):
        return type(action)(action.step + offset)
    if isinstance(action, Advance | Differentiate):
        return type(action)(action.start + offset, action.stop + offset)
    return action  # what a user wrote there is objected to where schedules are checked


def check_schedule(
    schedule: Iterable[Action], first: int, start: int, stop: int, given: Collection[int] = ()
) -> None:
    """Raise `ScheduleError` unless `schedule` differentiates `[start, stop)` exactly once.

    Args:
        schedule: The actions.
        first: Step of the window's first state, at most `start`.
        start: First step to differentiate.
        stop: End of the window.
        given: Further steps whose states exist without being kept.
    """
    checker = _Checker(first, stop, {first, *given})
    for action in schedule:
        checker.take(action)
    checker.finish(start)


class _Checker:
    """Follows a schedule, action by action, and objects to the first that cannot be done."""

    def __init__(self, first: int, stop: int, given: set[int]) -> None:
        self.first, self.stop, self.given = first, stop, given
        self.front = stop  # [front, stop) is differentiated
        self.working: int | None = first
        self.kept: set[int] = set()

    def take(self, action: Action) -> None:
        match action:
            case Advance(start, stop):
                self._check_range(action, start, stop)
                self.working = stop
            case Differentiate(start, stop):
                self._check_range(action, start, stop)
                if stop != self.front:
                    self._object(action, f"the steps up to {self.front} come next")
                self.front, self.working = start, None
            case Keep(step):
                if self.working != step:
                    self._object(action, f"the working state stands at {self.working}")
                if step in self.kept:
                    self._object(action, "that state is kept already")
                self.kept.add(step)
            case Drop(step):
                if step not in self.kept:
                    self._object(action, f"the kept states are {sorted(self.kept)}")
                self.kept.discard(step)
            case _:
                self._object(action, "it is none of Advance, Keep, Differentiate, Drop")

    def finish(self, start: int) -> None:
        if self.front != start:
            raise ScheduleError(
                f"the schedule differentiates [{self.front}, {self.stop}), "
                f"the window is [{start}, {self.stop})"
            )
        if self.kept:
            raise ScheduleError(f"the schedule never drops the states kept at {sorted(self.kept)}")

    def _check_range(self, action: Action, start: int, stop: int) -> None:
        if not self.first <= start < stop <= self.front:
            self._object(action, f"steps must lie in order within [{self.first}, {self.front})")
        if start != self.working and start not in self.kept and start not in self.given:
            self._object(action, f"no state is at hand at step {start}")

    def _object(self, action: object, why: str) -> None:
        raise ScheduleError(f"{action} cannot be done: {why}")


def usual_advance_steps(longest_leaf: int) -> int:
    """Most steps of one call in an advance where memory sets no tighter bound."""
    return max(ADVANCE_STEPS, longest_leaf)
