"""What an executor runs next: it asks for an action when the one before is done."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from tbptt_ckpt.schedule.actions import Action


class Route(Protocol):
    """The actions of one window, one by one.

    Attributes:
        advance_steps: Most steps of one call of a segment module in the advances to come.
    """

    @property
    def advance_steps(self) -> int:
        """See the class."""
        ...

    def next_action(self) -> Action | None:
        """The next action, now that the last one is done; None at the end."""
        ...


class PlannedRoute:
    """A schedule as it was planned.

    Args:
        actions: In order.
        advance_steps: As for `Route`.
    """

    def __init__(self, actions: Iterable[Action], advance_steps: int) -> None:
        self._actions, self.advance_steps = iter(actions), advance_steps

    def next_action(self) -> Action | None:
        """The next one."""
        return next(self._actions, None)
