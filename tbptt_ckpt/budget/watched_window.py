"""A measured window against its prediction: what its costs should have been."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice

from tbptt_ckpt.budget.checked_costs import ROUNDING_BYTES, TOLERANCE
from tbptt_ckpt.budget.fitting import FittingPlans
from tbptt_ckpt.budget.kept_states import lacking_bytes
from tbptt_ckpt.budget.window_budget import PlannedWindow, Request, Shape
from tbptt_ckpt.errors import InfeasibleBudgetError
from tbptt_ckpt.executor.window_pass import Route
from tbptt_ckpt.memory.meter import Lap
from tbptt_ckpt.schedule.actions import Action, Advance, Differentiate, Drop, Keep, Schedule, moved
from tbptt_ckpt.schedule.costs import Costs
from tbptt_ckpt.schedule.curves import raised, scaled
from tbptt_ckpt.schedule.plan import Block, Plan, PredictedPlan
from tbptt_ckpt.schedule.simulator import simulate

_LEAST_RATIO = 0.1


@dataclass(slots=True)
class Ratios:
    """Measured over predicted bytes, at their largest; None before the first."""

    largest: float | None = None

    def add(self, measured: float, predicted: float) -> None:
        """One more measurement; what allocators round is no deviation."""
        predicted = max(predicted, 1.0)
        ratio = max(measured / predicted, _LEAST_RATIO)
        if abs(measured - predicted) <= ROUNDING_BYTES:
            ratio = 1.0
        self.largest = ratio if self.largest is None else max(self.largest, ratio)

    @property
    def factor(self) -> float:
        """What the curve is to be multiplied by, from one length on to all of them."""
        return max(1.0, self.largest or 1.0)

    @property
    def factor_either_way(self) -> float:
        """The same where lengths of all sizes were measured, so that it may be smaller too."""
        if self.largest is None or 1 - TOLERANCE <= self.largest <= 1:
            return 1.0
        return self.largest


@dataclass(slots=True)
class WatchedWindow(PlannedWindow):
    """Compares the actions of one window with its costs, and replans the rest if it must.

    Attributes:
        costs: What its plan was made from, with the window's fixed part.
        shape: Its shape.
        given: Steps whose states need not be kept.
        missing_bytes: Of the fixed part, what does not exist before the update.
        absent_bytes: Of these, states that only later windows have.
        optimizer_bytes: State of the optimizer that exists before the window.
        gradient_bytes: What the first leaf's backward leaves behind.
        made_state_bytes: What the module makes of a first state for itself.
        absent_gradient_bytes: What the first leaf makes of gradients where some may exist before;
            that of a state is made in every window.
        plans: Replans, within the budget.
        refuse: What to raise where the rest of the window does not fit.
        rest: The actions that replaced those of the plan, where it was left.
        peak_bytes: The highest so far.
    """

    metered = True

    plan: PredictedPlan
    costs: Costs
    shape: Shape
    given: frozenset[int]
    missing_bytes: int
    absent_bytes: int
    optimizer_bytes: int
    gradient_bytes: int
    made_state_bytes: int
    absent_gradient_bytes: int
    plans: FittingPlans
    refuse: Callable[[WatchedWindow, InfeasibleBudgetError], InfeasibleBudgetError]
    rest: list[Action] = field(default_factory=list)
    leaf: Ratios = field(default_factory=Ratios)
    last_leaf: Ratios = field(default_factory=Ratios)
    advances: dict[int, int] = field(default_factory=dict)
    excess_bytes: int = 0
    peak_bytes: int = 0
    _kept: list[int] = field(default_factory=list)
    _num_done: int = 0
    _left_at: int | None = None  # the end of the steps that are still to be replanned

    def take(self, action: Action, begun: Lap, ended: Lap) -> bool:
        """Take in what an action took; whether the rest would exceed the budget as planned."""
        self.peak_bytes = max(self.peak_bytes, ended.peak_bytes)
        if self._left_at is None:
            self._num_done += 1
        else:
            self.rest.append(action)
        match action:
            case Keep(step):
                self._kept.append(step)
            case Drop(step):
                self._kept.remove(step)
            case Advance(start, stop):
                self._compare_advance(start, stop, begun, ended)
            case Differentiate(start, stop):
                self._compare_leaf(start, stop, begun, ended)
                if start > self._begin and self._must_replan(start):
                    self._left_at = start
                    return True
        return False

    def corrected(self, costs: Costs) -> Costs:
        """Costs that would have predicted this window, or slightly more."""
        costs = costs.with_leaves(
            partial(scaled, factor=self.leaf.factor_either_way),
            partial(scaled, factor=self._last_leaf_factor),
        )
        quiet = costs.quiet
        return replace(
            costs,
            advance_bytes=raised(costs.advance_bytes, self.advances),
            quiet=quiet and replace(quiet, advance=raised(quiet.advance, self.advances)),
            fixed=replace(costs.fixed, other=costs.fixed.other + self.excess_bytes),
        )

    @property
    def _last_leaf_factor(self) -> float:
        """Measured at one length only: smaller than one only as far as other leaves agree."""
        return max(self.last_leaf.factor_either_way, min(1.0, self.leaf.factor_either_way))

    def _num_losses(self, start: int, stop: int) -> int:
        """Steps of `[start, stop)` that have a loss."""
        return max(0, stop - max(start, self._stop - self.shape.new_steps))

    def _compare_advance(self, start: int, stop: int, begun: Lap, ended: Lap) -> None:
        steps, most_steps = stop - start, self.plan.advance_steps
        taken = ended.peak_bytes - begun.now_bytes - self._made_at(start)
        num_losses = self._num_losses(start, stop)
        if taken > self.costs.advance_peak(steps, num_losses, most_steps) + ROUNDING_BYTES:
            call_steps = min(steps, most_steps)
            self.advances[call_steps] = max(taken, self.advances.get(call_steps, 0))

    def _compare_leaf(self, start: int, stop: int, begun: Lap, ended: Lap) -> None:
        taken = ended.peak_bytes - begun.now_bytes - self._made_at(start)
        makes_gradients = stop == self._stop and self.costs.last_leaf_bytes is not None
        predicted = self.costs.leaf_peak(
            stop - start, self._num_losses(start, stop), is_last=makes_gradients
        )
        if makes_gradients:
            self.last_leaf.add(taken - self.gradient_bytes, predicted)
            return
        self.leaf.add(taken - self.absent_gradient_bytes * (stop == self._stop), predicted)
        kept_bytes = len(self._kept) * self.costs.kept_state_bytes
        is_working = start not in self.given and start not in self._kept
        expected = self._fixed_bytes + kept_bytes + is_working * self.costs.state_bytes
        if begun.now_bytes > expected + ROUNDING_BYTES:
            self.excess_bytes = max(self.excess_bytes, begun.now_bytes - expected)

    def _made_at(self, start: int) -> int:
        """Bytes of the state that a run from `start` makes for itself."""
        return self.made_state_bytes if start == self.plan.first else 0

    def _must_replan(self, stop: int) -> bool:
        """Whether the leaves to come would take more than there is."""
        predicted = self.plan.predicted_peak_bytes
        longest = min(self.plan.longest_leaf, stop - self._begin)
        leaf_bytes = self.costs.leaf_peak(longest, self._num_losses(stop - longest, stop))
        more = (self.leaf.factor - 1) * leaf_bytes + self.excess_bytes
        too_much = more > ROUNDING_BYTES and predicted + more > self.plans.budget
        return self._left_at is None and too_much

    def next_stretch(self) -> Route | None:
        """The steps that are left, from the last back, block by block between kept states.

        Raises:
            InfeasibleBudgetError: They do not fit however they are planned.
        """
        stop = self._left_at
        if stop is None or stop <= self._begin:
            return None
        useless = [Drop(step) for step in self._kept if step >= stop]
        if useless:
            return Route(useless, self.plan.advance_steps)
        costs = self.corrected(replace(self.costs, last_leaf_bytes=None))
        start = max(s for s in {self._begin, *self.given, *self._kept} if s < stop)
        kept = sum(step <= start for step in self._kept)
        beside = self._fixed_bytes + self.excess_bytes + kept * costs.kept_state_bytes
        drops = [Drop(start)] if start in self._kept else []
        try:
            num_losses = self._num_losses(start, stop)
            part = self.plans.replan(start, stop, num_losses, beside, costs)
        except InfeasibleBudgetError as error:
            if not drops or start in self.given:
                raise self.refuse(self, error) from None
            return Route(drops, self.plan.advance_steps)  # an earlier state needs one less
        self._left_at = start
        return Route(chain(part.schedule, drops), part.advance_steps)

    def executed_plan(self) -> Plan:
        """The plan as it was followed."""
        if self._left_at is None:
            return self.plan
        actions = [*islice(self.plan.schedule, self._num_done), *self.rest]
        if self.plan.lead_steps:  # the plan itself adds what comes before and after
            actions = actions[2:-1]
        relative = [moved(action, -self._begin) for action in actions]
        block = Block(self.plan.num_steps, Schedule(lambda: iter(relative), len(relative)))
        return replace(self.plan, blocks=(block,))

    @property
    def _begin(self) -> int:
        """First step that is differentiated."""
        return self.plan.first + self.plan.lead_steps

    @property
    def _stop(self) -> int:
        return self._begin + self.plan.num_steps

    @property
    def _fixed_bytes(self) -> int:
        """What exists in any case while leaves run."""
        fixed = self.costs.fixed.total(self.plan.lead_steps + self.plan.num_steps)
        return fixed - self.missing_bytes


def _as_measured_now(
    request: Request, chosen: PredictedPlan, costs: Costs, missing: int, absent: int
) -> PredictedPlan:
    """The plan with the prediction of an early window, where not all exists yet.

    `missing` are bytes of the optimizer's state that its update makes, `absent` those of states
    that only later windows have.
    """
    fixed = costs.fixed
    now = replace(fixed, optimizer=fixed.optimizer - missing, states=fixed.states - absent)
    leaves = simulate(
        chosen.schedule,
        replace(costs, fixed=now, update_bytes=0),
        given=request.absolute_joints,
        advance_steps=chosen.advance_steps,
        loss_start=request.window.new_start,
    )
    update = fixed.total(request.shape.run_steps) - absent + costs.update_bytes
    return replace(chosen, predicted_peak_bytes=max(leaves.peak_bytes, update))


def watched(
    request: Request,
    shape: Shape,
    chosen: PredictedPlan,
    costs: Costs,
    optimizer_bytes: int,
    plans: FittingPlans,
    refuse: Callable[[WatchedWindow, InfeasibleBudgetError], InfeasibleBudgetError],
) -> WatchedWindow:
    """A window that is held against its plan, which is for the time when all exists.

    `optimizer_bytes` are those of the state that exists now.
    """
    missing = costs.fixed.optimizer - optimizer_bytes
    handed_on = costs.handed_on_bytes
    state_gradient = costs.state_bytes + handed_on
    made = lacking_bytes(request.first_state, costs, request.device)
    coming = request.shape.coming_states * costs.state_bytes + handed_on
    recorded = max(0, request.bytes_of(*request.recorded) - handed_on)
    absent = max(0, costs.fixed.states - coming - made - recorded)
    if missing or absent:
        chosen = _as_measured_now(request, chosen, costs, missing, absent)
    given = {*request.absolute_joints}
    if not chosen.lead_steps:
        given.add(request.window.start)
    return WatchedWindow(
        plan=chosen,
        costs=costs,
        shape=shape,
        given=frozenset(given),
        missing_bytes=missing + absent,
        absent_bytes=absent,
        optimizer_bytes=optimizer_bytes,
        gradient_bytes=costs.fixed.gradients + state_gradient,
        made_state_bytes=made,
        absent_gradient_bytes=request.absent_gradient_bytes + state_gradient,
        plans=plans,
        refuse=refuse,
    )
