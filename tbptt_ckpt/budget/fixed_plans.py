"""Windows whose plans need no costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tbptt_ckpt.budget.planned_window import PlannedWindow, Request
from tbptt_ckpt.memory.meter import Lap
from tbptt_ckpt.schedule.plan import Plan, plan_window
from tbptt_ckpt.schedule.strategies import NestedStrategy, Strategy
from tbptt_ckpt.schedule.windows import Window

# Where windows grow with the sequence every one has a plan of its own.
_MOST_PLANS = 256


@dataclass(slots=True)
class FixedPlans:
    """Follows a fixed strategy; its memory is what it is."""

    strategy: Strategy
    _plans: dict[tuple[int, ...], Plan] = field(default_factory=dict)

    @property
    def has_costs(self) -> bool:
        """Never: none are needed."""
        return False

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

    def state_dict(self) -> dict[str, Any]:
        """Nothing is measured."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """There is nothing to go on with."""
