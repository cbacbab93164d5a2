"""Parts of a plan: neighbouring stretches that are run alike, written down once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tbptt_ckpt.schedule.actions import (
    Action,
    Advance,
    Differentiate,
    Drop,
    Keep,
    Schedule,
    executed_steps,
    longest_leaf,
    most_advances,
    most_states,
    moved,
    num_leaves,
)
from tbptt_ckpt.schedule.nesting import Nesting

_ACTIONS: dict[str, type[Action]] = {
    "advance": Advance,
    "keep": Keep,
    "differentiate": Differentiate,
    "drop": Drop,
}
_NAMES = {action: name for name, action in _ACTIONS.items()}


@dataclass(frozen=True, slots=True)
class Block:
    """Neighbouring stretches of a window that are run alike, each from a given state.

    Attributes:
        steps: Steps of each.
        how: Its nesting, or the actions that a user wrote, counted from step 0.
        count: Their number.
    """

    steps: int
    how: Nesting | Schedule
    count: int = 1

    def actions(self, start: int) -> Iterator[Action]:
        """The actions of one of them, if its first step is `start`."""
        if isinstance(self.how, Nesting):
            return self.how.actions(start)
        return (moved(action, start) for action in self.how)

    @property
    def executed_steps(self) -> int:
        """Module steps that one of them runs."""
        return _of(self.how, "executed_steps", executed_steps)

    @property
    def longest_leaf(self) -> int:
        """Steps of the longest leaf."""
        return _of(self.how, "longest_leaf", longest_leaf)

    @property
    def num_boundaries(self) -> int:
        """The most states at once; see `Plan.num_boundaries`."""
        return _of(self.how, "num_boundaries", most_states)

    @property
    def num_leaves(self) -> int:
        """Leaves of one of them."""
        return _of(self.how, "num_leaves", num_leaves)

    @property
    def num_levels(self) -> int:
        """The most often that a step is advanced."""
        return _of(self.how, "num_levels", most_advances)

    @property
    def num_actions(self) -> int:
        """Actions of one of them."""
        return self.how.num_actions if isinstance(self.how, Nesting) else len(self.how)

    @property
    def is_leaf(self) -> bool:
        """Whether one leaf is all."""
        return self.num_actions == 1


def _of(how: Nesting | Schedule, name: str, counted: Any) -> int:
    """What a nesting knows and a user's actions are counted for."""
    number: int = getattr(how, name) if isinstance(how, Nesting) else counted(how)
    return number


def _plain_block(block: Block) -> dict[str, Any]:
    plain: dict[str, Any] = {"steps": block.steps, "count": block.count}
    if isinstance(block.how, Nesting):
        plain["nodes"] = [list(node) for node in block.how.nodes]
    else:
        plain["actions"] = [_plain_action(action) for action in block.how]
    return plain


def _plain_action(action: Action) -> list[Any]:
    if isinstance(action, Keep | Drop):
        return [_NAMES[type(action)], action.step]
    return [_NAMES[type(action)], action.start, action.stop]


def _read_block(plain: Mapping[str, Any]) -> Block:
    how: Nesting | Schedule
    if "nodes" in plain:
        how = Nesting(tuple((int(a), int(b), int(c)) for a, b, c in plain["nodes"]))
    else:
        actions = [_ACTIONS[name](*steps) for name, *steps in plain["actions"]]
        how = Schedule(lambda: iter(actions), len(actions))
    return Block(int(plain["steps"]), how, int(plain["count"]))
