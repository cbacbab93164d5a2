"""Windows whose plans need no costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tbptt_ckpt.memory import Lap
from tbptt_ckpt.plans import plan_window
from tbptt_ckpt.strategies import Strategy
from tbptt_ckpt.window_plans.requests import PlannedWindow, Request
from tbptt_ckpt.windows import Window


@dataclass(slots=True)
class FixedPlans:
    """Follows a fixed strategy; its memory is what it is."""

    strategy: Strategy

    @property
    def has_costs(self) -> bool:
        """Never: none are needed."""
        return False

    def plan(
        self, window: Window, joints: Sequence[int], make_request: Callable[[], Request]
    ) -> PlannedWindow:
        """The strategy's plan."""
        return PlannedWindow(
            plan_window(self.strategy, window.first, window.start, window.stop, joints)
        )

    def learn(self, planned: PlannedWindow, update: Lap, peak_bytes: int) -> None:
        """There is nothing to correct."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing is measured."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """There is nothing to go on with."""
