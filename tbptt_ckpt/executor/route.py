"""What an executor runs next: it asks for an action when the one before is done."""

from __future__ import annotations

from collections.abc import Iterable

from tbptt_ckpt.schedule.actions import Action


class Route:
    """The actions of one window, one by one, as they were planned.

    Args:
        actions: In order.
        advance_steps: See below.

    Attributes:
        advance_steps: Most steps of one call of a segment module in the advances to come.
    """

    def __init__(self, actions: Iterable[Action], advance_steps: int) -> None:
        self._actions, self.advance_steps = iter(actions), advance_steps

    def next_action(self) -> Action | None:
        """The next action, now that the last one is done; None at the end."""
        return next(self._actions, None)
