"""What is asked of a planner of windows, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tbptt_ckpt.budget.meter import Bystander, Pilot
from tbptt_ckpt.budget.probe import SegmentProbe
from tbptt_ckpt.data.blocks import StepBlock
from tbptt_ckpt.memory.meter import Lap
from tbptt_ckpt.schedule.plan import Plan
from tbptt_ckpt.schedule.strategies import Strategy
from tbptt_ckpt.schedule.windows import Window


@dataclass(frozen=True, slots=True)
class Shape:
    """What a window looks like to a planner, wherever it lies.

    Attributes:
        num_steps: Steps to differentiate.
        new_steps: Steps that no window before has run.
        joints: Steps inside whose states are given, counted from the first differentiated.
        recorded_states: States that exist before it for it and later ones to start from.
        coming_states: States that it notes, and the gradient of one.
    """

    num_steps: int
    new_steps: int
    joints: tuple[int, ...]
    recorded_states: int
    coming_states: int

    @property
    def run_steps(self) -> int:
        """Steps that run at all."""
        return max(self.num_steps, self.new_steps)


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
        blocks: Its inputs and targets.
        make_probe: Makes what measures segments of it.
    """

    window: Window
    shape: Shape
    fullest: Shape
    held: tuple[object, ...]
    recorded: tuple[object, ...]
    coming_ambients: int
    makes_first_state: bool
    blocks: Sequence[StepBlock]
    make_probe: Callable[[], SegmentProbe]

    @property
    def input_bytes(self) -> int:
        """Bytes of its inputs and targets."""
        return sum(block.num_bytes() for block in self.blocks)

    @property
    def absolute_joints(self) -> tuple[int, ...]:
        """The joints as steps of the sequence."""
        return tuple(self.window.start + joint for joint in self.shape.joints)


def fullest_shape(
    shape: Shape, window: Window, num_steps: int | None, k1: int, k2: int | None, *, stale: bool
) -> Shape:
    """The shape of the largest window from this one on, as far as it can be known."""
    if window.stop == num_steps:
        return shape
    reach = num_steps if k2 is None else k2 if num_steps is None else min(k2, num_steps)
    steps = max(shape.num_steps, reach or 0)
    overlap = max(0, steps - k1)
    if not stale or not overlap:
        return Shape(steps, k1, (), 1 + bool(overlap), 2 + bool(overlap))
    first = steps % k1 or k1  # blocks are cut at update points, counted back from the end
    joints = tuple(range(first, overlap + 1, k1))
    starts = 0 if k2 is None or steps % k1 == 0 else -(-overlap // k1)
    return Shape(steps, k1, joints, 1 + len(joints) + starts, 3)


@dataclass(slots=True)
class PlannedWindow:
    """A window that is ready to run.

    Attributes:
        plan: How.
        pilot: Follows it where it is metered.
        metered: Whether its plan has to be held against a measurement.
    """

    plan: Plan
    pilot: Pilot = field(default_factory=Bystander)
    metered: bool = False


class WindowPlans(Protocol):
    """Plans the windows of a run, and learns from those that were measured.

    Attributes:
        strategy: What was asked for.
    """

    strategy: Strategy

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

    def state_dict(self) -> dict[str, Any]:
        """What was measured and planned, as plain data; empty where nothing is."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what `state_dict` returned, instead of measuring anew."""
        ...
