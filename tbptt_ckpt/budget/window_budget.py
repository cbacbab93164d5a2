"""What is asked about a window before it runs, and what a budget answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from tbptt_ckpt.budget.corrections import UNCORRECTED, PlanWatch
from tbptt_ckpt.budget.probe import SegmentProbe
from tbptt_ckpt.budget.shape import Shape
from tbptt_ckpt.data.blocks import StepBlock
from tbptt_ckpt.memory.meter import Lap
from tbptt_ckpt.schedule.plan import Plan
from tbptt_ckpt.schedule.strategies import Strategy
from tbptt_ckpt.schedule.windows import Window


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
    watch: PlanWatch = UNCORRECTED
    metered: bool = False

    def executed_plan(self) -> Plan:
        """The plan as it was followed."""
        return self.watch.executed_plan(self.plan)


class WindowBudget(Protocol):
    """Plans the windows of a run within bytes, and learns from those that were measured."""

    @property
    def strategy(self) -> Strategy:
        """How schedules are chosen now."""
        ...

    @property
    def has_costs(self) -> bool:
        """Whether plans follow from costs that are known by now."""
        ...

    def plan(
        self, window: Window, joints: Sequence[int], make_request: Callable[[], Request]
    ) -> PlannedWindow:
        """The plan of one window.

        Args:
            window: Its steps.
            joints: Steps of the sequence inside it whose states are given.
            make_request: All else about it, for those who need more.

        Raises:
            InfeasibleBudgetError: It does not fit the budget.
        """
        ...

    def learn(self, planned: PlannedWindow, update: Lap, peak_bytes: int) -> None:
        """A window was measured, its update included."""
        ...

    def shrink(self, window: Window) -> str | None:
        """Plan with less memory from here on, since `window` found none.

        Returns:
            What changes, for a message; None where nothing takes less.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """What was measured and planned, as plain data; empty where nothing is."""
        ...

    def load_state_dict(self, state: Mapping[str, Any], used: str | None = None) -> None:
        """Go on with what `state_dict` returned, instead of measuring anew.

        Args:
            state: What it returned.
            used: The strategy that was used in the end; None for the one that was asked for.
        """
        ...
