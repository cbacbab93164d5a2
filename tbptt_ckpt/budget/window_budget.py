"""Who plans windows: what is asked about one before it runs, and what is answered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tbptt_ckpt.budget.corrections import PlanWatch
from tbptt_ckpt.budget.probe import SegmentProbe
from tbptt_ckpt.budget.shape import Shape
from tbptt_ckpt.budget.smaller import smaller_strategy
from tbptt_ckpt.data.blocks import StepBlock
from tbptt_ckpt.memory.meter import Lap
from tbptt_ckpt.schedule.plan import Plan, plan_window
from tbptt_ckpt.schedule.strategies import NestedStrategy, Strategy, parse_strategy
from tbptt_ckpt.schedule.windows import Window

_UNWATCHED = PlanWatch()
# Where windows grow with the sequence every one has a plan of its own.
_MOST_PLANS = 256


@dataclass(frozen=True, slots=True)
class Request:
    """A window to plan.

    Attributes:
        window: Its steps.
        shape: The same as seen by a planner.
        fullest: The shape of the window that takes most, this one or a later one.
        held: Trees of what is live before it and belongs to the run, gradients and recorded
            states aside.
        recorded: Trees of recorded states.
        coming_ambients: Generators and buffers at update points that a later window finds noted
            beside those that are now.
        makes_first_state: Whether the module makes the first state for itself, from None.
        copies_weights: Whether its update copies what it changes.
        blocks: Its inputs and targets.
        device: Where memory counts.
        make_probe: Makes what measures segments of it.
    """

    window: Window
    shape: Shape
    fullest: Shape
    held: tuple[object, ...]
    recorded: tuple[object, ...]
    coming_ambients: int
    makes_first_state: bool
    copies_weights: bool
    blocks: Sequence[StepBlock]
    device: torch.device
    make_probe: Callable[[], SegmentProbe]

    @property
    def input_bytes(self) -> int:
        """Bytes of its inputs and targets."""
        return sum(block.num_bytes() for block in self.blocks)

    @property
    def absolute_joints(self) -> tuple[int, ...]:
        """The joints as steps of the sequence."""
        return tuple(self.window.start + joint for joint in self.shape.joints)


@dataclass(frozen=True, slots=True)
class PlannedWindow:
    """A window that is ready to run.

    Attributes:
        plan: How.
        watch: Holds what it takes against the plan.
        metered: Whether the window has to be measured for that.
    """

    plan: Plan
    watch: PlanWatch = _UNWATCHED
    metered: bool = False

    def executed_plan(self) -> Plan:
        """The plan as it was followed."""
        return self.watch.executed_plan(self.plan)


class WindowBudget:
    """Plans the windows of a run by a fixed strategy; their memory is what it is.

    Args:
        strategy: The strategy.
    """

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy
        self._fixed_plans: dict[tuple[int, ...], Plan] = {}

    @property
    def strategy(self) -> Strategy:
        """How schedules are chosen: as asked for, or smaller since memory was missing."""
        return self._strategy

    @property
    def has_costs(self) -> bool:
        """Whether plans follow from costs that are known by now."""
        return False

    def plan(
        self, window: Window, joints: Sequence[int], make_request: Callable[[], Request]
    ) -> PlannedWindow:
        """The plan of one window; windows of one shape share it.

        Args:
            window: Its steps.
            joints: Steps of the sequence inside it whose states are given.
            make_request: All else about it, where costs count.

        Raises:
            InfeasibleBudgetError: It does not fit a budget.
        """
        first = window.first
        shape = (window.start - first, window.stop - first, *(joint - first for joint in joints))
        plan = self._fixed_plans.get(shape)
        if plan is None:
            plan = plan_window(self._strategy, first, window.start, window.stop, joints)
            if isinstance(self._strategy, NestedStrategy):  # what a user writes may not repeat
                self._remember(shape, plan)
        return PlannedWindow(plan.at(first))

    def _remember(self, shape: tuple[int, ...], plan: Plan) -> None:
        if len(self._fixed_plans) >= _MOST_PLANS:
            self._fixed_plans.clear()
        self._fixed_plans[shape] = plan

    def learn(self, planned: PlannedWindow, update: Lap, peak_bytes: int) -> None:
        """A window was measured, its update included."""

    def shrink(self, window: Window) -> str | None:
        """Plan with less memory from here on, since `window` found none.

        Returns:
            What is used now, for a message; None where nothing takes less.
        """
        smaller = smaller_strategy(self._strategy, window)
        if smaller is None:
            return None
        self._follow(smaller)
        return str(smaller)

    def _follow(self, strategy: Strategy) -> None:
        self._strategy = strategy
        self._fixed_plans.clear()

    def state_dict(self) -> dict[str, Any]:
        """What was measured and planned, as plain data; empty where nothing is."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any], used: str | None = None) -> None:
        """Go on with what `state_dict` returned, instead of measuring anew.

        Args:
            state: What it returned.
            used: The strategy that was used in the end; None for the one that was asked for.
        """
        if used not in (None, str(self._strategy)):
            self._follow(parse_strategy(used))
