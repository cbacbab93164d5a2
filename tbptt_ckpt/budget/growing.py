"""Steps that become others: what they take is measured anew.

What is known of a run's windows holds for as many lanes, and features, as they were measured with.
Sequences that follow each other, such as batches of a loader, may have more; and a module that
changes may no longer be run by its parts, or by parts for the first time. They would take more than
was planned, and nobody would see it before it was too late.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from tbptt_ckpt.budget.measured_budget import MeasuredBudget
from tbptt_ckpt.budget.window_budget import PlannedWindow, Request, WindowBudget
from tbptt_ckpt.data.blocks import Column, StepBlock
from tbptt_ckpt.errors import InfeasibleBudgetError
from tbptt_ckpt.memory.meter import Lap
from tbptt_ckpt.module.trees import tensors_of
from tbptt_ckpt.schedule.costs import Costs
from tbptt_ckpt.schedule.forms import FormSeconds
from tbptt_ckpt.schedule.strategies import Strategy
from tbptt_ckpt.schedule.windows import Window
from tbptt_ckpt.time_batching.policy import TimeBatching

Sizes = list[list[int]]  # of each tensor of a step: bytes of a number, and its shape


class GrowingBudget(WindowBudget):
    """A measured budget for the largest steps so far; smaller ones are planned as they are.

    Attributes:
        times_made: How often it was begun anew.
    """

    def __init__(self, make: Callable[[], MeasuredBudget], batching: TimeBatching) -> None:
        self._make, self._present, self._batching = make, make(), batching
        self._library_bytes: int | None = None
        self._sizes: Sizes | None = None  # of the steps that it knows
        self._is_smaller = False  # whether the present sequence has steps below these
        self._runs_by_parts: bool | None = None  # those steps, as it was measured
        self._was_short = False  # whether windows had too few steps for a compiled block so far
        self.times_made = 1

    @property
    def strategy(self) -> Strategy:
        """How schedules are chosen."""
        return self._present.strategy

    @property
    def costs(self) -> Costs | None:
        """What the module takes; None before it has been measured, unless it was given."""
        return self._present.costs

    @property
    def has_measured(self) -> bool:
        """Whether the form of steps was decided by what was measured."""
        return self._present.has_measured

    @property
    def forms(self) -> FormSeconds:
        """Forms of steps that were weighed, with predicted seconds of the largest window."""
        return self._present.forms

    @property
    def budget_bytes(self) -> int | None:
        """The budget; None before the first window."""
        return self._present.budget_bytes

    def plan(
        self, window: Window, joints: Sequence[int], make_request: Callable[[], Request]
    ) -> PlannedWindow:
        """The window's plan."""
        request = make_request()
        self._look_at(sizes_of(request.blocks[0]))
        self._look_at_parts(request.runs_by_parts)
        self._look_at_compiled(request)
        was_known = self.costs is not None
        try:
            planned = self._present.plan(window, joints, lambda: request)
        except InfeasibleBudgetError:
            if not was_known or not self.forms:  # only one is open
                raise
            self._begin_anew()  # a form that was fast for shorter windows is not the smallest
            planned = self._present.plan(window, joints, lambda: request)
        # What smaller steps take says nothing of those that the costs are of.
        return PlannedWindow(planned.plan) if self._is_smaller else planned

    @property
    def may_measure(self) -> bool:
        """Whether costs are not known, and to be measured some time."""
        return self._present.is_measured and self.costs is None

    def plans_by_costs(self, request: Request) -> bool:
        """Whether the window's plan follows from costs."""
        return self._present.plans_by_costs(request)

    def measured(self) -> dict[str, Any]:
        """Costs as plain data, for others that run the same steps; empty where none are known."""
        return self._present.window_costs.state_dict() if self.costs else {}

    def take_measured(self, state: Mapping[str, Any]) -> None:
        """Plan with what another has measured."""
        self._present.window_costs.load_state_dict(state)

    def can_meter(self, device: torch.device) -> bool:
        """Whether memory can be measured now."""
        return self._present.can_meter(device)

    def learn(
        self, planned: PlannedWindow, update: Lap, peak_bytes: int, reserved_bytes: int | None
    ) -> None:
        """Correct the costs by a measured window."""
        self._present.learn(planned, update, peak_bytes, reserved_bytes)

    def shrink(self, window: Window) -> str | None:
        """Plan with less from here on."""
        return self._present.shrink(window)

    def state_dict(self) -> dict[str, Any]:
        """Costs, plans, and the steps that they are of."""
        state = self._present.state_dict()
        mine = {"sizes": self._sizes, "is_smaller": self._is_smaller}
        mine |= {"runs_by_parts": self._runs_by_parts, "was_short": self._was_short}
        return state and {**state, **mine}

    def load_state_dict(self, state: Mapping[str, Any], used: str | None = None) -> None:
        """Go on with the same."""
        self._present.load_state_dict(state, used)
        sizes = state.get("sizes")  # older ones do not say
        self._sizes = sizes and [list(size) for size in sizes]
        self._is_smaller = state.get("is_smaller", False)
        self._runs_by_parts = state.get("runs_by_parts")
        self._was_short = state.get("was_short", False)

    def _look_at(self, sizes: Sizes) -> None:
        known = self._sizes
        self._is_smaller = known is not None and sizes != known and within(sizes, known)
        if self._is_smaller or sizes == known or not sizes:
            return
        if known is not None:
            self._begin_anew()
        self._sizes = sizes

    def _look_at_parts(self, runs_by_parts: bool | None) -> None:
        known = self._runs_by_parts
        if runs_by_parts is None or runs_by_parts == known:
            return
        if known is not None and self.costs is not None:
            self._begin_anew()
        self._runs_by_parts = runs_by_parts

    def _look_at_compiled(self, request: Request) -> None:
        """Have steps compiled, where they run so or may; if they cannot be, not any more."""
        is_compiled, ahead = self._batching.is_compiled, request.compile_ahead
        is_open = self._was_short or not self.has_measured
        if ahead is not None and (is_compiled or is_open):
            measures = self._present.plans_by_costs(request)
            is_ready = ahead(self._present.room(request) if measures else math.inf)
        else:  # a snapshot's may be compiled, and not asked for any more
            is_ready = None if ahead is not None else False
        was_short, self._was_short = self._was_short, is_open and is_ready is None
        if is_ready and was_short and self.has_measured:
            self._begin_anew()  # forms of windows that have no block were weighed
        elif is_ready and self.costs is not None:  # given ones are of the form that was asked for
            self._batching.decide("compiled")
        if is_ready is False and is_compiled:
            self._batching.do_not_compile()
            if self.has_measured:
                self._begin_anew()
                self._sizes, self._is_smaller = sizes_of(request.blocks[0]) or None, False

    def _begin_anew(self) -> None:
        self._present = self._make()
        self.times_made += 1


def sizes_of(block: StepBlock) -> Sizes:
    """Those of one step of a block; none where its steps are of several kinds."""
    found: Sizes = []
    if isinstance(block.inputs, Column) or isinstance(block.targets, Column):
        return found
    for tensor in tensors_of(block.inputs) or tensors_of(block.targets):
        shape = list(tensor.shape)
        del shape[block.time_dim]
        found.append([tensor.itemsize, *shape])
    return found


def within(sizes: Sizes, known: Sizes) -> bool:
    """Whether steps are no larger than known ones, tensor by tensor."""
    return [len(size) for size in sizes] == [len(size) for size in known] and all(
        here <= there
        for size, other in zip(sizes, known, strict=True)
        for here, there in zip(size, other, strict=True)
    )
