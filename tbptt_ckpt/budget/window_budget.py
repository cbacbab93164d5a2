"""Who plans windows: what is asked about one before it runs, and what is answered."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import torch

from tbptt_ckpt.budget.probe import SegmentProbe
from tbptt_ckpt.data.blocks import StepBlock
from tbptt_ckpt.executor.window_pass import Route
from tbptt_ckpt.memory.libraries import library_bytes
from tbptt_ckpt.memory.meter import Lap, can_measure
from tbptt_ckpt.memory.storages import tensor_bytes
from tbptt_ckpt.schedule.actions import Action
from tbptt_ckpt.schedule.costs import Costs
from tbptt_ckpt.schedule.forms import FormSeconds
from tbptt_ckpt.schedule.plan import Plan, plan_window
from tbptt_ckpt.schedule.strategies import (
    NestedStrategy,
    Revolve,
    Strategy,
    Uniform,
    parse_strategy,
)
from tbptt_ckpt.schedule.windows import (
    Window,
    joint_steps,
    noted_steps,
    recorded_steps,
    window_at,
)

_log = logging.getLogger("tbptt_ckpt")

# Where windows grow with the sequence every one has a plan of its own.
_MOST_PLANS = 256
# Below a quarter of the square root of the window, uniform leaves need more for their first
# states than they save; several levels of few states take over.
_FEW_STATES = (16, 4, 1)


class Cuts(IntEnum):
    """Where segments are cut whatever the plan: nowhere, up to the first loss, or everywhere."""

    NONE = 0
    EARLY = 1
    ALL = 2


@dataclass(frozen=True, slots=True)
class Shape:
    """What a window looks like to a planner, wherever it lies."""

    num_steps: int  # steps to differentiate
    new_steps: int  # steps that no window before has run
    # Steps inside whose states are given, counted from the first differentiated.
    joints: tuple[int, ...]
    recorded_states: int  # states that exist before it for it and later ones to start from
    coming_states: int  # states that it notes, and the gradient of one
    cuts: Cuts = Cuts.NONE  # of segments, that its leaves may go on across
    lead_steps: int = 0  # earlier ones that only advance, as its gradient was stopped by lot

    @property
    def run_steps(self) -> int:
        """Steps that run at all."""
        return max(self.lead_steps + self.num_steps, self.new_steps)

    def with_states(self, num_states: int) -> Shape:
        """The same beside so many more states."""
        return replace(self, coming_states=self.coming_states + num_states)

    def reaching(self, window: Window, joints: Sequence[int]) -> Shape:
        """The same where the gradient reaches back over `window`, part of it."""
        lead_steps = 0 if window.run_start is None else window.start - window.run_start
        return replace(
            self,
            num_steps=window.stop - window.start,
            joints=tuple(joint - window.start for joint in joints),
            lead_steps=lead_steps,
        ).with_states(-bool(lead_steps))


def shape_of(
    window: Window, num_steps: int | None, k1: int, k2: int | None, *, stale: bool
) -> Shape:
    """What a window of a run looks like, if no window before it was silent or skipped."""
    joints = joint_steps(window, k1) if stale else ()
    return Shape(
        num_steps=window.stop - window.start,
        new_steps=window.num_new_steps,
        joints=tuple(joint - window.start for joint in joints),
        recorded_states=len(recorded_steps(window, num_steps, k1, k2, stale=stale)),
        coming_states=2 + len(noted_steps(window, num_steps, k1, k2, stale=stale)),
    )


def fullest_window(window: Window, num_steps: int | None, k1: int, k2: int | None) -> Window:
    """One with the reach of the largest from this one on, as far as it can be known.

    A last window that ends off the grid of update points may find one state more.
    """
    if window.stop == num_steps:
        return window
    reach = num_steps if k2 is None else k2 if num_steps is None else min(k2, num_steps)
    steps = max(window.stop - window.start, reach or 0)
    return window_at(-(-steps // k1), None, k1, steps)


@dataclass(frozen=True, slots=True)
class Request:
    """A window to plan."""

    window: Window
    shape: Shape  # the same as seen by a planner
    fullest: Shape  # the shape of the window that takes most, this one or a later one
    # Trees of what is live before it and belongs to the run, gradients and recorded states aside.
    held: tuple[object, ...]
    recorded: tuple[object, ...]  # trees of recorded states
    coming_ambients: int  # generators and buffers that a later window finds noted in addition
    first_state: object  # the tree that it begins with
    is_only: bool  # whether its run has no other window
    absent_gradient_bytes: int  # of weights that have none before it
    learned_bytes: int  # of a first state that has gradients
    ahead_bytes: int  # steps after it that a stream has given already
    # Taken beside the blocks of so many steps while they are read and packed, between windows.
    reading_bytes: Callable[[int], int]
    copies_weights: bool  # whether its update copies what it changes
    library_bytes: int  # what libraries keep of the device's memory
    runs_by_parts: bool | None  # whether its steps do; None where their form does not ask
    loss_start: int  # the first step that has a loss
    cuts: Sequence[int]  # where segments are cut whatever the plan
    blocks: Sequence[StepBlock]  # its steps
    device: torch.device  # where memory counts
    make_probe: Callable[[], SegmentProbe]  # makes what measures segments of it
    # Compiles its steps, in so many bytes: whether they can be run so, None where they are too few.
    compile_ahead: Callable[[float], bool | None] | None = None  # None where none are to be

    @property
    def input_bytes(self) -> int:
        """Bytes of its steps."""
        return sum(block.num_bytes() for block in self.blocks)

    def bytes_of(self, *trees: object) -> int:
        """Bytes of tensors where memory counts: counters of an optimizer may be elsewhere."""
        return tensor_bytes(*trees, device=self.device)

    @property
    def absolute_joints(self) -> tuple[int, ...]:
        """The joints as steps of the sequence."""
        return tuple(self.window.start + joint for joint in self.shape.joints)


class PlannedWindow:
    """A window that is ready to run, by a plan that goes on whatever it takes."""

    metered = False

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def take(self, action: Action, begun: Lap, ended: Lap) -> bool:
        """An action is done; whether the rest is to go on otherwise, in stretches."""
        return False

    def next_stretch(self) -> Route | None:
        """What comes next where the plan was left; None at the end, or if it was not."""
        return None

    def executed_plan(self) -> Plan:
        """The plan as it was followed."""
        return self.plan


class WindowBudget:
    """Plans the windows of a run by a fixed strategy; their memory is what it is."""

    times_made = 0  # what was measured is of another run of steps where this has changed

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy
        self._fixed_plans: dict[tuple[int, ...], Plan] = {}
        self._has_warned = False
        self._library_bytes: int | None = None

    @property
    def strategy(self) -> Strategy:
        """How schedules are chosen: as asked for, or smaller since memory was missing."""
        return self._strategy

    @property
    def costs(self) -> Costs | None:
        """What the module takes, where plans follow from it and it is known by now."""
        return None

    @property
    def has_measured(self) -> bool:
        """Whether the form of steps was decided by what was measured."""
        return False

    @property
    def forms(self) -> FormSeconds:
        """Forms of steps that were weighed, with predicted seconds of the largest window."""
        return {}

    def can_meter(self, device: torch.device) -> bool:
        """Whether memory can be measured now; the first time that it cannot be a log says so."""
        can_meter = can_measure(device)
        if not can_meter and not self._has_warned:
            self._has_warned = True
            _log.warning(
                "a profiler is active on this thread, so no memory can be measured: windows go on "
                "unmeasured as long as it is, and a memory_budget is held by what is known before"
            )
        return can_meter

    def library_bytes(self, device: torch.device) -> int:
        """What libraries keep of a device's memory, counted once: it is there in any case."""
        if self._library_bytes is None:
            self._library_bytes = library_bytes(device)
        return self._library_bytes

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
                if len(self._fixed_plans) >= _MOST_PLANS:
                    self._fixed_plans.clear()
                self._fixed_plans[shape] = plan
        return PlannedWindow(plan.at(first))

    def learn(
        self, planned: PlannedWindow, update: Lap, peak_bytes: int, reserved_bytes: int | None
    ) -> None:
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


def smaller_strategy(strategy: Strategy, window: Window) -> Strategy | None:
    """The next strategy to try, or None where `strategy` takes the least there is.

    Leaves are halved, then states are kept at several levels; the gradient stays the same.
    """
    if isinstance(strategy, Revolve):
        fewer = [count for count in _FEW_STATES if count < strategy.num_states]
        return Revolve(fewer[0]) if fewer else None
    first, start, stop = window.first, window.start, window.stop
    leaf_steps = plan_window(strategy, first, start, stop).longest_leaf // 2
    if leaf_steps >= max(1, math.isqrt(stop - start) // 4):
        return Uniform(leaf_steps)
    return Revolve(_FEW_STATES[0])
