"""Windows whose plans need no costs, and are kept within no bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tbptt_ckpt.budget.smaller import smaller_strategy
from tbptt_ckpt.budget.window_budget import PlannedWindow, Request
from tbptt_ckpt.memory.meter import Lap
from tbptt_ckpt.schedule.plan import Plan, plan_window
from tbptt_ckpt.schedule.strategies import NestedStrategy, Strategy, parse_strategy
from tbptt_ckpt.schedule.windows import Window

# Where windows grow with the sequence every one has a plan of its own.
_MOST_PLANS = 256


class Unbudgeted:
    """Follows a fixed strategy; its memory is what it is.

    Args:
        strategy: The strategy.

    Attributes:
        strategy: The same, or a smaller one since memory was missing.
        has_costs: Never: none are needed.
    """

    has_costs = False

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self._plans: dict[tuple[int, ...], Plan] = {}

    def plan(
        self, window: Window, joints: Sequence[int], make_request: Callable[[], Request]
    ) -> PlannedWindow:
        """The strategy's plan; windows of one shape share it."""
        first = window.first
        shape = (window.start - first, window.stop - first, *(joint - first for joint in joints))
        plan = self._plans.get(shape)
        if plan is None:
            plan = plan_window(self.strategy, first, window.start, window.stop, joints)
            if isinstance(self.strategy, NestedStrategy):  # what a user writes may not repeat
                self._remember(shape, plan)
        return PlannedWindow(plan.at(first))

    def _remember(self, shape: tuple[int, ...], plan: Plan) -> None:
        if len(self._plans) >= _MOST_PLANS:
            self._plans.clear()
        self._plans[shape] = plan

    def learn(self, planned: PlannedWindow, update: Lap, peak_bytes: int) -> None:
        """There is nothing to correct."""

    def shrink(self, window: Window) -> str | None:
        """Follow the next smaller strategy."""
        smaller = smaller_strategy(self.strategy, window)
        if smaller is None:
            return None
        self.strategy = smaller
        self._plans.clear()
        return str(smaller)

    def state_dict(self) -> dict[str, Any]:
        """Nothing is measured."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any], used: str | None = None) -> None:
        """Go on with the strategy that was used in the end, if it is another."""
        if used not in (None, str(self.strategy)):
            self.strategy = parse_strategy(used)
