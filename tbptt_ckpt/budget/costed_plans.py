"""Windows planned from measured costs within a byte budget."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from tbptt_ckpt.budget.amount import AUTO_BUDGET, Budget, explained
from tbptt_ckpt.budget.calibrate import Limits, calibrate
from tbptt_ckpt.budget.corrections import Corrections
from tbptt_ckpt.budget.curves import (
    CHECKED_STEPS,
    ROUNDING_BYTES,
    at_least,
    not_below,
    with_host_bytes,
)
from tbptt_ckpt.budget.fixed_plans import FixedPlans
from tbptt_ckpt.budget.forms import costs_of_forms, fastest_form
from tbptt_ckpt.budget.planned_window import PlannedWindow, Request, Shape
from tbptt_ckpt.budget.update_bytes import update_bytes
from tbptt_ckpt.errors import InfeasibleBudgetError
from tbptt_ckpt.memory.meter import Lap, can_measure
from tbptt_ckpt.memory.sizes import format_bytes
from tbptt_ckpt.memory.storages import tensor_bytes
from tbptt_ckpt.planner.fastest import OPTIMAL, plan
from tbptt_ckpt.schedule.costs import Costs, FixedBytes
from tbptt_ckpt.schedule.plan import Plan
from tbptt_ckpt.schedule.simulator import simulate
from tbptt_ckpt.schedule.strategies import SHORT_WINDOW_STEPS, Auto, Optimal, Strategy
from tbptt_ckpt.schedule.windows import Window
from tbptt_ckpt.time_batching.policy import TimeBatching
from tbptt_ckpt.updates.updater import Updater

_log = logging.getLogger("tbptt_ckpt")

_RESERVE = 0.1  # of what the first plan may use, until its leaves are measured
_MARGIN = 0.02  # the same ever after: kernels round sizes up, some lengths more than others
# Near the smallest budget a few states are most of the room, and all of the speed: a plan beside
# the reserve may take so many times the seconds of one without, or there is less of a reserve.
_PRICE_OF_RESERVE, _LESS_OF_RESERVE = 1.25, (1.0, 0.5, 0.25)
_MOST_METERED = 8  # windows; overlaps that grow make a new plan for each
_MUCH_LONGER = 2  # than any metered one: measured all the same, as its plan is of another kind
_MOST_CACHED = 64


class CostedPlans:
    """Plans each shape of window once, within a budget, from costs that are measured first.

    Args:
        strategy: "auto" and "optimal" for the fastest plan, or a fixed one, whose bytes are
            checked.
        budget: Bytes; None plans for the free memory and holds nothing against it.
        costs: What the module takes; None to have it measured at the first window. Where a
            budget is promised, their bytes are held against a few short segments first.
        updater: Whose state and transients count.
        parameters: The weights.
        device: Where memory counts.
        batching: Whether steps are batched over time; where "auto" leaves that open, plans from
            the measured costs of both forms decide.
    """

    def __init__(
        self,
        strategy: Strategy,
        budget: Budget | None,
        costs: Costs | None,
        updater: Updater,
        parameters: Sequence[nn.Parameter],
        device: torch.device,
        batching: TimeBatching,
    ) -> None:
        self.strategy, self._promised = strategy, budget is not None
        self._budget = budget or AUTO_BUDGET
        self._updater, self._parameters, self._device = updater, parameters, device
        self._batching = batching
        self.costs, self._is_checked = costs, costs is None or not self._promised
        self._measured_first: Costs | None = None  # before any correction
        self.budget_bytes: int | None = None
        self._reserve = _RESERVE if self._promised else 0.0
        self._finds_fastest = isinstance(strategy, Auto | Optimal)
        self._plans: OrderedDict[Shape, _Planned] = OrderedDict()
        self._confirmed: set[Shape] = set()
        self._longest_seen = 0  # windows up to this reach were found to fit
        self._num_metered, self._longest_metered = 0, 0

    def plan(
        self, window: Window, joints: Sequence[int], make_request: Callable[[], Request]
    ) -> PlannedWindow:
        """The window's plan; measures costs if there are none yet."""
        request = make_request()
        if self.costs is None and not self._promised and not self._is_worth_measuring(request):
            return FixedPlans(Auto()).plan(window, joints, make_request)
        held_bytes = tensor_bytes(*request.held)
        shape, found = request.shape, self._prepare(request, held_bytes)
        costs = self._costs_of(found, shape, request, held_bytes)
        chosen = self._chosen(shape, costs).at(window.first)
        if shape in self._confirmed or self._has_seen_alike(shape) or not self._promised:
            return PlannedWindow(chosen)
        return self._watched(request, chosen, costs)

    def _has_seen_alike(self, shape: Shape) -> bool:
        """Whether so many windows were measured, of such lengths, that one more tells nothing."""
        return (
            self._num_metered >= _MOST_METERED
            and shape.run_steps < _MUCH_LONGER * self._longest_metered
        )

    @property
    def has_costs(self) -> bool:
        """Whether costs have been measured or given."""
        return self.costs is not None

    def learn(self, planned: PlannedWindow, update: Lap, peak_bytes: int) -> None:
        """Correct the costs by a measured window; the plans made from wrong ones are dropped."""
        pilot = planned.pilot
        if not isinstance(pilot, _Watched) or self.costs is None:
            return
        self._num_metered += 1
        self._longest_metered = max(self._longest_metered, pilot.shape.run_steps)
        costs = self._corrected(pilot, self.costs)
        fixed = self._with_optimizer(pilot.costs).fixed.total(pilot.shape.run_steps)
        if update.peak_bytes > fixed + costs.update_bytes:
            costs = replace(costs, update_bytes=update.peak_bytes - fixed)
        is_right = costs == self.costs
        _log.info(
            "predicted %s, measured %s%s",
            format_bytes(planned.plan.predicted_peak_bytes or 0),
            format_bytes(peak_bytes),
            "" if is_right else "; costs corrected",
        )
        if is_right and self._reserve == _MARGIN:
            self._confirmed.add(pilot.shape)
            return
        self._adopt(costs)
        self._keep_what_ran(pilot, planned.plan, update)

    def _corrected(self, pilot: _Watched, costs: Costs) -> Costs:
        """Costs that would have predicted a window, and no less than was measured at first.

        A window may have leaves of one length alone: that they took less says nothing of others.
        """
        return not_below(pilot.corrected(costs), self._measured_first)

    def _adopt(self, costs: Costs) -> None:
        """Plan with other costs from here on."""
        self.costs, self._reserve, self._longest_seen = costs, _MARGIN, 0
        self._plans.clear()
        self._confirmed.clear()

    def _keep_what_ran(self, pilot: _Watched, ran: Plan, update: Lap) -> None:
        """Corrected costs err upwards: a plan that ran within the budget goes on if none fits."""
        assert self.costs is not None
        assert self.budget_bytes is not None
        made = self._optimizer_bytes() - pilot.optimizer_bytes
        peak = max(pilot.peak_bytes + made, update.peak_bytes) + pilot.absent_bytes
        if pilot.rest or peak > self.budget_bytes:
            return
        corrected = self._with_optimizer(self._corrected(pilot, pilot.costs))
        costs = replace(corrected, update_bytes=self.costs.update_bytes)
        try:
            self._planned(pilot.shape, costs, self.budget_bytes)
        except InfeasibleBudgetError:
            fixed = costs.fixed.total(pilot.shape.run_steps)
            self._plans[pilot.shape] = _Planned(fixed, replace(ran, predicted_peak_bytes=peak))

    def _with_optimizer(self, costs: Costs) -> Costs:
        """The costs with the optimizer's state as large as it is now, if that is more."""
        largest = max(costs.fixed.optimizer, self._optimizer_bytes())
        return replace(costs, fixed=replace(costs.fixed, optimizer=largest))

    def state_dict(self) -> dict[str, Any]:
        """Costs and plans as plain data; empty before the first window."""
        if self.costs is None:
            return {}
        return {
            "costs": self.costs.to_dict(),
            "measured_first": self._measured_first and self._measured_first.to_dict(),
            "time_batching": self._batching.pays_off,
            "budget_bytes": self.budget_bytes,
            "reserve": self._reserve,
            "num_metered": self._num_metered,
            "longest_metered": self._longest_metered,
            "plans": [
                {
                    "shape": asdict(shape),
                    "fixed_bytes": known.fixed_bytes,
                    "plan": known.plan.to_dict(),
                    "confirmed": shape in self._confirmed,
                }
                for shape, known in self._plans.items()
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the same costs and plans; a budget in bytes stays as it is given now."""
        if not state:
            return
        self.costs, self._is_checked = Costs.from_dict(state["costs"]), True
        first = state.get("measured_first")  # older ones have none
        self._measured_first = first and Costs.from_dict(first)
        self._batching.pays_off = state.get("time_batching", True)  # older ones followed the rule
        self.budget_bytes = self._budget.num_bytes or state["budget_bytes"]
        self._reserve, self._num_metered = state["reserve"], state["num_metered"]
        self._longest_metered = state.get("longest_metered", 0)  # older ones do not say
        for entry in state["plans"]:
            shape = Shape(**{**entry["shape"], "joints": tuple(entry["shape"]["joints"])})
            self._plans[shape] = _Planned(entry["fixed_bytes"], Plan.from_dict(entry["plan"]))
            if entry["confirmed"]:
                self._confirmed.add(shape)

    def _chosen(self, shape: Shape, costs: Costs) -> Plan:
        """The plan of a shape; the known one as long as it fits, so that runs repeat."""
        assert self.budget_bytes is not None
        fixed, known = costs.fixed.total(shape.run_steps), self._plans.get(shape)
        if known is not None:
            peak = (known.plan.predicted_peak_bytes or 0) + fixed - known.fixed_bytes
            if peak <= self.budget_bytes or not self._promised:
                return replace(known.plan, predicted_peak_bytes=peak)
        chosen = self._within_budget(shape, costs)
        self._plans[shape] = _Planned(fixed, chosen)
        while len(self._plans) > _MOST_CACHED:
            self._plans.popitem(last=False)
        return chosen

    def _is_worth_measuring(self, request: Request) -> bool:
        if request.shape.run_steps <= SHORT_WINDOW_STEPS:
            return False
        if not can_measure(self._device):
            _log.warning("a profiler is active on this thread, so no plan can be measured")
            return False
        return True

    def _prepare(self, request: Request, held_bytes: int) -> Costs:
        """Fix the budget, measure the costs, and make sure that larger windows will fit."""
        if self.budget_bytes is None:
            now_bytes = held_bytes + tensor_bytes(*request.recorded) + request.input_bytes
            self.budget_bytes = self._budget.bytes_beside(now_bytes, self._device)
        fullest, reach = request.fullest, request.shape.run_steps
        room = self.budget_bytes - held_bytes - request.input_bytes
        if self.costs is None:
            self.costs = self._of_fastest_form(request, held_bytes, Limits(reach, room_bytes=room))
            self._measured_first = self.costs
        elif not self._is_checked:
            short = Limits(min(reach, CHECKED_STEPS), max_seconds=0.0, room_bytes=room)
            found = self._measured(request, short)
            self.costs = at_least(self.costs, found, max(reach, fullest.run_steps))
        self._is_checked = True
        is_longest = self._promised and fullest.num_steps > self._longest_seen
        if is_longest and fullest not in self._plans:
            self._within_budget(fullest, self._costs_of(self.costs, fullest, request, held_bytes))
        return self.costs

    def _of_fastest_form(self, request: Request, held_bytes: int, limits: Limits) -> Costs:
        """Measured costs; where steps may be batched over time or not, those of the faster form."""

        def measure(seconds: float) -> Costs:
            return self._measured(request, replace(limits, max_seconds=seconds))

        def planned(costs: Costs) -> Plan:
            shape = request.fullest
            return self._fitting(shape, self._costs_of(costs, shape, request, held_bytes))

        if not self._finds_fastest:
            return measure(limits.max_seconds)
        per_step = request.make_probe().runner.recurrence.per_step
        forms = costs_of_forms(self._batching, per_step, measure, limits.max_seconds)
        self._batching.pays_off = fastest_form(forms, planned)
        return forms[self._batching.pays_off]

    def _measured(self, request: Request, limits: Limits) -> Costs:
        update = update_bytes(self._updater)
        return calibrate(request.make_probe(), limits, update, FixedBytes())

    def _costs_of(self, costs: Costs, shape: Shape, request: Request, held_bytes: int) -> Costs:
        """Costs with the fixed part as it is in a window of some shape."""
        fixed = costs.fixed
        if not self._promised and self._device.type == "cpu":
            costs = with_host_bytes(costs)  # what is free is so for both
        exists = self._optimizer_bytes()
        trained = [p for p in self._parameters if p.requires_grad]
        states = max(request.fullest.recorded_states, shape.recorded_states) + shape.coming_states
        states += request.makes_first_state
        state_bytes = states * costs.state_bytes + request.coming_ambients * costs.ambient_bytes
        return replace(
            costs,
            last_leaf_bytes=costs.last_leaf_bytes if self._updater.clears_gradients else None,
            fixed=FixedBytes(
                weights=held_bytes - exists,
                gradients=fixed.gradients or tensor_bytes(trained),
                optimizer=max(exists, fixed.optimizer),
                states=state_bytes,
                step_inputs=request.input_bytes / request.shape.run_steps,
                other=fixed.other + 2 * ROUNDING_BYTES,
            ),
        )

    def _optimizer_bytes(self) -> int:
        optimizer = self._updater.optimizer
        return 0 if optimizer is None else tensor_bytes(optimizer)

    def _within_budget(self, shape: Shape, costs: Costs) -> Plan:
        chosen = self._fitting(shape, costs)
        self._longest_seen = max(self._longest_seen, shape.num_steps)
        return chosen

    def _fitting(self, shape: Shape, costs: Costs) -> Plan:
        assert self.budget_bytes is not None
        try:
            whole = self._planned(shape, costs, self.budget_bytes)
        except InfeasibleBudgetError as error:
            if self._promised or shape.num_steps > self._longest_seen:
                raise self._explained(error, shape) from None
            _log.warning("windows take slightly more than was free at first: %s", error)
            return self._planned(shape, costs, error.smallest_budget_bytes or 0)
        if not self._finds_fastest or not self._reserve:  # a fixed strategy has but one plan
            return whole
        return self._beside_reserve(shape, costs, whole)

    def _beside_reserve(self, shape: Shape, costs: Costs, whole: Plan) -> Plan:
        """A plan that leaves as much of the reserve as is worth its price.

        Args:
            shape: The window's.
            costs: Its costs.
            whole: The plan that leaves none.
        """
        assert self.budget_bytes is not None
        free = max(0, self.budget_bytes - costs.fixed.total(shape.run_steps))
        affordable = _PRICE_OF_RESERVE * (whole.predicted_seconds or 0.0)
        for share in _LESS_OF_RESERVE:
            reserved = int(share * self._reserve * free)
            try:
                chosen = self._planned(shape, costs, self.budget_bytes - reserved)
            except InfeasibleBudgetError:
                continue
            if (chosen.predicted_seconds or 0.0) <= affordable:
                return chosen
        return whole

    def _planned(self, shape: Shape, costs: Costs, budget_bytes: int) -> Plan:
        return plan(
            shape.num_steps,
            costs,
            budget_bytes=max(1, budget_bytes),
            strategy=OPTIMAL if self._finds_fastest else self.strategy,
            new_steps=shape.new_steps,
            joints=shape.joints,
        )

    def _explained(self, error: InfeasibleBudgetError, shape: Shape) -> InfeasibleBudgetError:
        assert self.budget_bytes is not None
        fixed = None if self._finds_fastest else str(self.strategy)
        return explained(error, self._budget, self.budget_bytes, shape.num_steps, fixed)

    def _watched(self, request: Request, chosen: Plan, costs: Costs) -> PlannedWindow:
        missing = costs.fixed.optimizer - self._optimizer_bytes()
        made = request.makes_first_state * costs.state_bytes
        recorded = costs.fixed.states - request.shape.coming_states * costs.state_bytes - made
        absent = max(0, recorded - tensor_bytes(*request.recorded))
        if missing or absent:
            chosen = self._as_measured_now(request, chosen, costs, missing, absent)
        given = {*request.absolute_joints}
        if not chosen.lead_steps:
            given.add(request.window.start)
        pilot = _Watched(
            plan=chosen,
            costs=costs,
            stop=request.window.stop,
            given=frozenset(given),
            budget_bytes=self.budget_bytes or 0,
            missing_bytes=missing + absent,
            absent_bytes=absent,
            optimizer_bytes=self._optimizer_bytes(),
            first_state_bytes=made,
            gradient_bytes=costs.fixed.gradients + costs.state_bytes,
            replan=self._replan,
            shape=request.shape,
        )
        pilot.refuse = partial(self._refusal, pilot)
        return PlannedWindow(chosen, pilot, metered=True)

    def _as_measured_now(
        self, request: Request, chosen: Plan, costs: Costs, missing: int, absent: int
    ) -> Plan:
        """The plan with the prediction of an early window, where not all exists yet.

        Args:
            request: The window.
            chosen: Its plan.
            costs: Its costs.
            missing: Bytes of the optimizer's state that the update makes.
            absent: Bytes of states that only later windows have.
        """
        fixed = costs.fixed
        now = replace(fixed, optimizer=fixed.optimizer - missing, states=fixed.states - absent)
        leaves = simulate(
            chosen.schedule,
            replace(costs, fixed=now, update_bytes=0),
            given=request.absolute_joints,
            advance_steps=chosen.advance_steps,
        )
        update = fixed.total(request.shape.run_steps) - absent + costs.update_bytes
        return replace(chosen, predicted_peak_bytes=max(leaves.peak_bytes, update))

    def _replan(self, start: int, stop: int, beside_bytes: int, costs: Costs) -> Plan:
        """A plan of some steps of a window, with what else is there at the time."""
        costs = replace(costs, update_bytes=0, fixed=FixedBytes(other=beside_bytes))
        return plan(stop - start, costs, budget_bytes=self.budget_bytes, first=start)

    def _refusal(self, pilot: _Watched, error: InfeasibleBudgetError) -> InfeasibleBudgetError:
        """What to raise in a window whose rest does not fit, before anything exceeds the budget."""
        assert self.costs is not None
        assert self.budget_bytes is not None
        self._adopt(self._corrected(pilot, self.costs))  # so that another try knows from the start
        try:
            self._planned(pilot.shape, self._corrected(pilot, pilot.costs), self.budget_bytes)
        except InfeasibleBudgetError as whole:
            error = whole
        return self._explained(error, pilot.shape)


@dataclass(frozen=True, slots=True)
class _Planned:
    """A plan, and the fixed part it was made beside."""

    fixed_bytes: int
    plan: Plan


@dataclass(slots=True)
class _Watched(Corrections):
    """Corrections of a window whose shape is known."""

    shape: Shape = Shape(1, 1, (), 0, 0)  # noqa: RUF009
    absent_bytes: int = 0  # of the missing ones, states that only later windows have
    optimizer_bytes: int = 0  # that exist before the window
