"""How a schedule is chosen when no byte budget is involved.

Every strategy differentiates the same steps and so gives the same gradient; they differ
in how many states they keep, how long a leaf is, and how often a step runs again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol, get_args, runtime_checkable

from tbptt_ckpt.arguments import PositiveInt, check_fields
from tbptt_ckpt.errors import ArgumentError, ScheduleError, shown
from tbptt_ckpt.schedule.actions import Action, Differentiate, check_schedule, moved
from tbptt_ckpt.schedule.nesting import Nesting, NestingBuilder


@runtime_checkable
class Strategy(Protocol):
    """Chooses the schedule of one stretch of steps that begins at a given state."""

    def actions(self, start: int, stop: int, window_steps: int) -> Iterator[Action]:
        """Actions that differentiate `[start, stop)`, part of a window of `window_steps` steps."""
        ...


class NestedStrategy:
    """A strategy that answers with a nesting, compact however long the stretch."""

    __slots__ = ()

    def nesting(self, steps: int, window_steps: int) -> Nesting:
        """How `steps` steps are differentiated, part of a window of `window_steps` steps."""
        raise NotImplementedError

    def actions(self, start: int, stop: int, window_steps: int) -> Iterator[Action]:
        """The nesting's actions."""
        return self.nesting(stop - start, window_steps).placed(start)

    def __str__(self) -> str:
        """How it is written where it has no numbers: "sqrt"."""
        return type(self).__name__.lower()


@dataclass(frozen=True, slots=True)
class Retain(NestedStrategy):
    """Everything in one leaf: plain BPTT, the most memory and no step run twice."""

    def nesting(self, steps: int, window_steps: int) -> Nesting:
        """One leaf."""
        builder = NestingBuilder()
        return builder.build(builder.leaf(steps))


@dataclass(frozen=True, slots=True)
class Uniform(NestedStrategy):
    """Leaves of a fixed number of steps; every step but those of the last leaf runs twice."""

    leaf_steps: PositiveInt

    def __post_init__(self) -> None:
        check_fields(self)

    def nesting(self, steps: int, window_steps: int) -> Nesting:
        """Advance leaf by leaf, keep each leaf's first state, then differentiate backwards."""
        builder = NestingBuilder()
        before = (steps - 1) // self.leaf_steps
        last = builder.leaf(steps - before * self.leaf_steps)  # a shorter one is last in time
        return builder.build(builder.split(builder.leaf(self.leaf_steps), before, last))

    def __str__(self) -> str:
        return f"uniform:{self.leaf_steps}"


@dataclass(frozen=True, slots=True)
class Step(NestedStrategy):
    """A boundary state at every step: the smallest leaf, and as many states as steps."""

    def nesting(self, steps: int, window_steps: int) -> Nesting:
        """Leaves of one step."""
        return Uniform(1).nesting(steps, window_steps)


@dataclass(frozen=True, slots=True)
class Sqrt(NestedStrategy):
    """Leaves of ceil(sqrt(window steps)): about as many states as steps in a leaf."""

    def nesting(self, steps: int, window_steps: int) -> Nesting:
        """Uniform leaves whose length follows from the window's."""
        return Uniform(math.isqrt(window_steps - 1) + 1).nesting(steps, window_steps)


# Measuring what a step takes runs as many steps as a window of this length has.
SHORT_WINDOW_STEPS = 8


@dataclass(frozen=True, slots=True)
class Auto(NestedStrategy):
    """The fastest plan for the free memory, from measured costs.

    Without costs, short windows are retained and others cut as by `Sqrt`, in leaves of blocks.
    """

    block_steps: PositiveInt = 1

    def __post_init__(self) -> None:
        check_fields(self)

    def nesting(self, steps: int, window_steps: int) -> Nesting:
        """What is done without costs."""
        if window_steps <= SHORT_WINDOW_STEPS:
            return Retain().nesting(steps, window_steps)
        blocks = -(-(math.isqrt(window_steps - 1) + 1) // self.block_steps)
        return Uniform(blocks * self.block_steps).nesting(steps, window_steps)


@dataclass(frozen=True, slots=True)
class Optimal(NestedStrategy):
    """The fastest plan within a byte budget, from measured costs."""

    def nesting(self, steps: int, window_steps: int) -> Nesting:
        """There is none without costs."""
        raise ArgumentError(
            "strategy='optimal' needs measured costs, which TBPTT makes; elsewhere give the "
            "strategy that `plan` found, or a fixed one such as 'sqrt'"
        )


@dataclass(frozen=True, slots=True)
class Revolve(NestedStrategy):
    """One-step leaves from at most `num_states` kept states, in the fewest executed steps.

    The window's first state is one of them; the working state of the leaf that is being
    differentiated is not. Use it where steps are large and states few; for cheap steps
    the calls of one step each cost more than they save.

    References:
        Griewank & Walther (2000), doi:10.1145/347837.347846.
    """

    num_states: PositiveInt

    def __post_init__(self) -> None:
        check_fields(self)

    def nesting(self, steps: int, window_steps: int) -> Nesting:
        """The binomial schedule; its tree is walked with a stack."""
        builder = NestingBuilder()
        made: dict[tuple[int, int], int] = {}
        todo = [(steps, self.num_states)]
        while todo:
            stretch = todo[-1]
            if stretch in made:
                todo.pop()
                continue
            length, states = stretch
            if length == 1:
                made[stretch] = builder.leaf(1)
                continue
            left = length - 1 if states == 1 else _revolve_split(length, states)
            parts = [(left, states), (length - left, max(1, states - 1))]
            missing = [part for part in parts if part not in made]
            if missing:
                todo += missing
            else:
                made[stretch] = builder.split(made[parts[0]], 1, made[parts[1]])
        return builder.build(made[steps, self.num_states])

    def __str__(self) -> str:
        return f"revolve:{self.num_states}"


def _revolve_split(num_steps: int, num_states: int) -> int:
    """Steps to advance before the next state is kept.

    With r advances per step, s states reach beta(s, r) = C(s + r, s) steps. Any split that
    leaves both sides between their reaches of one advance less and of r is optimal
    (Griewank & Walther 2000, theorem 1); this takes the shortest left side.
    """
    advances = 0
    while math.comb(num_states + advances, num_states) < num_steps:
        advances += 1
    left_reach = math.comb(num_states + advances - 2, num_states) if advances >= 2 else 0
    right_reach = math.comb(num_states - 1 + advances, advances)
    return max(1, left_reach, num_steps - right_reach)


@dataclass(frozen=True, slots=True)
class UserSchedule:
    """A schedule that the user wrote, for windows of one length, counted from step 0."""

    relative: tuple[Action, ...]

    def __post_init__(self) -> None:
        check_schedule(self.relative, 0, 0, self._covered)

    @property
    def _covered(self) -> int:
        return max((a.stop for a in self.relative if isinstance(a, Differentiate)), default=0)

    def actions(self, start: int, stop: int, window_steps: int) -> Iterator[Action]:
        """The user's actions, moved to the window's start."""
        if self._covered != stop - start:
            raise ScheduleError(
                f"the schedule given as strategy covers {self._covered} steps, "
                f"the window [{start}, {stop}) has {stop - start}; "
                "pass a function of (start, stop) to serve windows of several lengths"
            )
        return (moved(action, start) for action in self.relative)

    def __str__(self) -> str:
        return "user schedule"


@dataclass(frozen=True, slots=True)
class UserFunction:
    """A function of `(start, stop)` that returns the actions of that window."""

    make: Callable[[int, int], Sequence[Action]]

    def actions(self, start: int, stop: int, window_steps: int) -> Iterator[Action]:
        """What the user's function returns."""
        actions = self.make(start, stop)
        if not isinstance(actions, Sequence):
            raise ScheduleError(
                f"the function given as strategy returned {type(actions).__name__} for "
                f"[{start}, {stop}); it must return a list of actions such as Differentiate(0, 5)"
            )
        return iter(actions)

    def __str__(self) -> str:
        return "user schedule"


StrategyName = Literal["auto", "optimal", "retain", "sqrt", "step"]
_MADE: tuple[Callable[[], Strategy], ...] = (Auto, Optimal, Retain, Sqrt, Step)
_NAMED: dict[str, Callable[[], Strategy]] = dict(zip(get_args(StrategyName), _MADE, strict=True))
_NUMBERED: dict[str, Callable[[int], Strategy]] = {"uniform": Uniform, "revolve": Revolve}


def parse_strategy(strategy: object) -> Strategy:
    """The strategy a user means: a name, `"uniform:32"`, an object, actions, or a function.

    Raises:
        ArgumentError: None of these.
    """
    if isinstance(strategy, str):
        return _parse_name(strategy)
    if isinstance(strategy, type):
        raise ArgumentError(f"strategy={shown(strategy)} is a class, not {_WHAT_WORKS}")
    if isinstance(strategy, Strategy):
        return strategy
    if isinstance(strategy, Sequence):
        return UserSchedule(tuple(strategy))
    if callable(strategy):
        return UserFunction(strategy)
    raise ArgumentError(f"strategy={shown(strategy)} is not {_WHAT_WORKS}")


_NUMBER = re.compile("[1-9][0-9]{0,17}")
_WHAT_WORKS = (
    f"one of {', '.join(map(repr, _NAMED))}, 'uniform:LENGTH', 'revolve:STATES', an object"
    " such as Uniform(32), a list of actions, or a function of (start, stop)"
)


def _parse_name(text: str) -> Strategy:
    name, colon, number = text.partition(":")
    if not colon and name in _NAMED:
        return _NAMED[name]()
    if name in _NUMBERED and _NUMBER.fullmatch(number):
        return _NUMBERED[name](int(number))
    raise ArgumentError(f"strategy={shown(text)} is not {_WHAT_WORKS}")


def check_strategy(name: str, value: object, alternative: str | None = None) -> None:
    """Raise `ArgumentError` unless `value` can be read as a strategy."""
    parse_strategy(value)


# Text with a number ("uniform:32") is read too, but no checker can tell it from a misspelt name:
# it is for files and command lines, `Uniform(32)` for code.
AnyStrategy = Annotated[
    StrategyName | Strategy | Sequence[Action] | Callable[[int, int], Sequence[Action]],
    check_strategy,
]
