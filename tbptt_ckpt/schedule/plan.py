"""A plan: how one window is run; where there are costs, with what that is predicted to take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields, replace
from functools import cached_property
from itertools import groupby, pairwise
from typing import Any, Self

from tbptt_ckpt.arguments import checked
from tbptt_ckpt.errors import ScheduleError
from tbptt_ckpt.schedule.actions import (
    Action,
    Advance,
    Differentiate,
    Drop,
    Keep,
    Schedule,
    check_schedule,
    moved,
    usual_advance_steps,
)
from tbptt_ckpt.schedule.forms import Form, described
from tbptt_ckpt.schedule.nesting import Nesting
from tbptt_ckpt.schedule.strategies import NestedStrategy, Retain, Strategy

_ACTIONS: dict[str, type[Action]] = {
    "advance": Advance,
    "keep": Keep,
    "differentiate": Differentiate,
    "drop": Drop,
}


@dataclass(frozen=True, slots=True)
class Block:
    """Neighbouring stretches of a window that are run alike, each from a given state."""

    steps: int  # steps of each
    how: Nesting | Schedule  # its nesting, or the actions that a user wrote, counted from step 0
    count: int = 1  # their number

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        plain: dict[str, Any] = {"steps": self.steps, "count": self.count}
        if isinstance(self.how, Nesting):
            plain["nodes"] = [list(node) for node in self.how.nodes]
        else:
            plain["actions"] = [[type(a).__name__.lower(), *astuple(a)] for a in self.how]
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Block:
        """The block that `to_dict` wrote."""
        how: Nesting | Schedule
        if "nodes" in plain:
            how = Nesting(tuple((int(a), int(b), int(c)) for a, b, c in plain["nodes"]))
        else:
            actions = [_ACTIONS[name](*steps) for name, *steps in plain["actions"]]
            how = Schedule(lambda: iter(actions), len(actions))
        return cls(int(plain["steps"]), how, int(plain["count"]))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How one window is run.

    It is small however long the window: equal segments are written once. Plans can be
    compared, printed, and written as JSON.

    Attributes:
        strategy: The name of the strategy that chose it.
        first: Step of the window's first state.
        lead_steps: Steps from there that only advance.
        blocks: The rest, in time order. Blocks are run from the last to the first.
        advance_steps: Most steps of one call of a segment module in an advance.
        predicted_peak_bytes: Peak of device memory, everything included; None in a plan that
            was made without costs, for which see `PredictedPlan`.
        predicted_seconds: Time; None in such a plan.
        form: How steps are made, in the plan of a window that ran.
        forms: Each form that was weighed, with the seconds that were predicted for the largest
            window; None where no plan fits.
    """

    strategy: str
    first: int
    lead_steps: int
    blocks: tuple[Block, ...]
    advance_steps: int
    form: Form = "auto"
    forms: tuple[tuple[Form, float | None], ...] = ()
    predicted_peak_bytes: int | None = field(default=None, init=False)
    predicted_seconds: float | None = field(default=None, init=False)

    @property
    def num_steps(self) -> int:
        """Steps that are differentiated."""
        return sum(block.count * block.steps for block in self.blocks)

    @cached_property
    def executed_steps(self) -> int:
        """Module steps that run: advanced ones plus differentiated ones."""
        return self.lead_steps + sum(b.count * b.how.counts.executed_steps for b in self.blocks)

    @cached_property
    def longest_leaf(self) -> int:
        """Steps of the longest leaf."""
        return max(block.how.longest_leaf for block in self.blocks)

    @cached_property
    def num_boundaries(self) -> int:
        """The most states at once, those that leaves start from included.

        The window's first state and recorded ones exist anyway and are not counted.
        """
        return bool(self.lead_steps) + max(b.how.counts.num_boundaries for b in self.blocks)

    @cached_property
    def num_leaves(self) -> int:
        """Leaves of the window."""
        return sum(block.count * block.how.counts.num_leaves for block in self.blocks)

    @cached_property
    def num_levels(self) -> int:
        """The most often that a step is advanced; leads are not counted."""
        return max(block.how.counts.num_levels for block in self.blocks)

    @property
    def schedule(self) -> Schedule:
        """The actions, made on demand."""
        length = sum(block.count * block.how.counts.num_actions for block in self.blocks)
        if self.lead_steps:
            length += 1 if self._is_one_leaf else 3
        return Schedule(self._actions, length)

    def actions(self, start: int, stop: int, window_steps: int) -> Iterator[Action]:
        """The actions of a window of as many steps: a plan may be given as a strategy."""
        if self.num_steps != stop - start:
            raise ScheduleError(
                f"the plan given as strategy is of {self.num_steps} steps, the window "
                f"[{start}, {stop}) has {stop - start}; give a strategy such as 'uniform:32' to "
                "serve windows of several lengths"
            )
        return self._placed(stop)

    def at(self, first: int) -> Self:
        """The same plan for a window whose first state stands at another step."""
        return self if first == self.first else replace(self, first=first)

    def without_costs(self) -> Plan:
        """The same plan, of which nothing is predicted."""
        made = {each.name: getattr(self, each.name) for each in fields(Plan) if each.init}
        return Plan(**{**made, "forms": ()})

    def predicted(self, peak_bytes: int, seconds: float, advance_steps: int) -> PredictedPlan:
        """The same plan with what it takes when an advance is cut into calls of so many steps."""
        made = {name: getattr(self, name) for name in ("strategy", "first", "lead_steps", "blocks")}
        return PredictedPlan(
            **made,
            advance_steps=advance_steps,
            predicted_peak_bytes=peak_bytes,
            predicted_seconds=seconds,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        plain = {each.name: getattr(self, each.name) for each in fields(self)}
        return {**plain, "blocks": [block.to_dict() for block in self.blocks]}

    @classmethod
    @checked
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        """The plan that `to_dict` wrote.

        Raises:
            ScheduleError: Anything else.
        """
        try:
            blocks = tuple(Block.from_dict(block) for block in plain["blocks"])
            forms = tuple((form, seconds) for form, seconds in plain.get("forms", ()))
            given = {**plain, "blocks": blocks, "forms": forms}
            kind: type[Plan] = PredictedPlan
            if plain["predicted_peak_bytes"] is None:
                kind = Plan
                del given["predicted_peak_bytes"], given["predicted_seconds"]
            plan = kind(**given)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise ScheduleError(f"not a plan: {error!r}") from error
        if not isinstance(plan, cls):
            raise ScheduleError(f"not a plan made from costs: {plan}")
        return plan

    def __repr__(self) -> str:
        return f"Plan({self})"

    def __str__(self) -> str:
        parts = [
            f"{self.strategy}: {self.num_steps:,} steps, {self.executed_steps:,} executed",
            f"leaves up to {self.longest_leaf:,}",
            f"{self.num_boundaries:,} states",
        ]
        if self.forms:
            parts.append(described(self.form, self.forms))
        return ", ".join(parts)

    @property
    def _is_one_leaf(self) -> bool:
        return (
            len(self.blocks) == self.blocks[0].count == self.blocks[0].how.counts.num_actions == 1
        )

    def _actions(self) -> Iterator[Action]:
        start = self.first + self.lead_steps
        if self.lead_steps:
            yield Advance(self.first, start)
        keeps_start = self.lead_steps and not self._is_one_leaf
        if keeps_start:  # a single leaf begins with the working state
            yield Keep(start)
        yield from self._placed(start + self.num_steps)
        if keeps_start:
            yield Drop(start)

    def _placed(self, stop: int) -> Iterator[Action]:
        for block in reversed(self.blocks):
            for _ in range(block.count):
                stop -= block.steps
                yield from block.how.placed(stop)


@dataclass(frozen=True)
class PredictedPlan(Plan):
    """A plan that was made from costs."""

    predicted_peak_bytes: int = field()
    predicted_seconds: float = field()

    def __str__(self) -> str:
        peak_bytes, seconds = self.predicted_peak_bytes, self.predicted_seconds
        return f"{super().__str__()}, {peak_bytes:,} bytes, {seconds:.3g} s predicted"


def plan_window(
    strategy: Strategy, first: int, start: int, stop: int, joints: Sequence[int] = ()
) -> Plan:
    """The plan of one window under a strategy that needs no costs.

    Args:
        strategy: How stretches are scheduled.
        first: Step of the window's first state; the steps up to `start` only advance.
        start: First step to differentiate.
        stop: End of the window.
        joints: Steps inside the window whose states are given (stale overlap). The blocks
            between them are scheduled one by one, the last first, since none of them needs
            the advance of the one before.

    Raises:
        ScheduleError: A user's schedule that does not differentiate the window.
    """
    if isinstance(strategy, Plan):
        strategy.actions(start, stop, stop - start)  # of as many steps
        plan = replace(strategy.without_costs(), first=first, lead_steps=start - first)
        check_schedule(plan.schedule, first, start, stop, joints)
        return plan
    if isinstance(strategy, Retain):
        joints = ()  # one leaf, whatever lies inside
    edges = pairwise([start, *joints, stop])
    if isinstance(strategy, NestedStrategy):
        lengths = [end - begin for begin, end in edges]
        blocks = run_length_coded((n, strategy.nesting(n, stop - start)) for n in lengths)
    else:
        blocks = tuple(_written_block(strategy, *edge, stop - start) for edge in edges)
    plan = Plan(
        strategy=str(strategy),
        first=first,
        lead_steps=start - first,
        blocks=blocks,
        advance_steps=usual_advance_steps(max(block.how.longest_leaf for block in blocks)),
    )
    if not isinstance(strategy, NestedStrategy):
        check_schedule(plan.schedule, first, start, stop, joints)
    return plan


def run_length_coded(stretches: Iterable[tuple[int, Nesting]]) -> tuple[Block, ...]:
    """Blocks of neighbouring stretches, (steps, nesting) each, in time order."""
    groups = groupby(stretches)
    return tuple(Block(*stretch, count=len(list(group))) for stretch, group in groups)


def _written_block(strategy: Strategy, start: int, stop: int, window_steps: int) -> Block:
    def relative() -> Iterator[Action]:
        return (moved(a, -start) for a in strategy.actions(start, stop, window_steps))

    return Block(stop - start, Schedule(relative))
