"""Plans that fit a budget: for each shape of window the fastest, or that of a fixed strategy."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch

from tbptt_ckpt.budget.amount import AUTO_BUDGET, Amount
from tbptt_ckpt.budget.reserved import Slack
from tbptt_ckpt.budget.window_budget import Cuts, Shape
from tbptt_ckpt.errors import InfeasibleBudgetError
from tbptt_ckpt.memory.sizes import format_bytes
from tbptt_ckpt.planner.fastest import OPTIMAL, plan
from tbptt_ckpt.schedule.costs import Costs, FixedBytes
from tbptt_ckpt.schedule.plan import PredictedPlan
from tbptt_ckpt.schedule.simulator import simulate
from tbptt_ckpt.schedule.strategies import Auto, Optimal, Strategy

_log = logging.getLogger("tbptt_ckpt")

_RESERVE = 0.1  # of what the first plan may use, until its leaves are measured
_MARGIN = 0.02  # the same ever after: kernels round sizes up, some lengths more than others
# Near the smallest budget a few states are most of the room, and all of the speed: a plan beside
# the reserve may take so many times the seconds of one without, or there is less of a reserve.
_PRICE_OF_RESERVE, _LESS_OF_RESERVE = 1.25, (1.0, 0.5, 0.25)
_MOST_CACHED = 64


class FittingPlans:
    """Plans each shape of window once, within a budget.

    Args:
        strategy: "auto" and "optimal" for the fastest plan, or a fixed one, whose bytes are
            checked.
        amount: The budget; None plans for the free memory and holds nothing against it.
        parted: Whether the fastest plan has no leaf across a joint.

    Attributes:
        strategy: How schedules are chosen.
        promised: Whether the budget is held.
        finds_fastest: Whether plans are chosen by their seconds.
        budget_bytes: The budget; None before the first window, see `budget`.
        slack: Of a budget of reserved bytes, those that are none of the run's tensors.
    """

    def __init__(self, strategy: Strategy, amount: Amount | None, *, parted: bool = False) -> None:
        self.strategy, self.promised, self._parted = strategy, amount is not None, parted
        self.finds_fastest = isinstance(strategy, Auto | Optimal)
        self._amount = amount or AUTO_BUDGET
        self.budget_bytes: int | None = None
        self.slack = Slack(self._amount.is_reserved)
        self._room: int | None = None  # for states and leaves, since memory was missing
        self._reserve = _RESERVE if self.promised else 0.0
        self._plans: OrderedDict[Shape, tuple[int, PredictedPlan]] = (
            OrderedDict()
        )  # and fixed bytes
        self._confirmed: set[Shape] = set()
        self._longest_seen = 0  # windows up to this reach were found to fit

    def fix_budget(self, live_bytes: int, device: torch.device) -> int:
        """What a run's tensors may take that holds some already; fixed by the first window."""
        self.slack.begin(device)
        if self.budget_bytes is None:
            self.budget_bytes = self._amount.bytes_beside(live_bytes, device)
        return self.budget

    def reserves_too_much(self, reserved_bytes: int | None, peak_bytes: int) -> bool:
        """Whether a window reserved more than the budget is of; plans leave room for it then."""
        whole = self.budget + self.slack.num_bytes
        return self.slack.exceeds(whole, reserved_bytes, peak_bytes)

    def check_fullest(self, shape: Shape, costs: Costs) -> None:
        """Raise `InfeasibleBudgetError` now, if larger windows will not fit a promised budget."""
        if self.promised and shape.num_steps > self._longest_seen and shape not in self._plans:
            self._within_budget(shape, costs)

    def chosen(self, shape: Shape, costs: Costs) -> PredictedPlan:
        """The plan of a shape; the known one as long as it fits, so that runs repeat."""
        fixed = costs.fixed.total(shape.run_steps)
        if shape in self._plans:
            fixed_before, plan = self._plans[shape]
            peak = plan.predicted_peak_bytes + fixed - fixed_before
            if peak <= self.budget or not self.promised:
                return replace(plan, predicted_peak_bytes=peak)
        plan = self._within_budget(shape, costs)
        self._keep(shape, fixed, plan)
        return plan

    def confirm(self, shape: Shape) -> bool:
        """A measured window was as predicted; whether its plan is final, with no reserve left."""
        if self._reserve == _MARGIN:
            self._confirmed.add(shape)
            return True
        return False

    def is_confirmed(self, shape: Shape) -> bool:
        """Whether a measured window of this shape was as predicted."""
        return shape in self._confirmed

    def start_over(self) -> None:
        """Costs were corrected: plans are made anew, with a small reserve."""
        self._reserve, self._longest_seen = _MARGIN, 0
        self.forget()

    def keep_what_ran(
        self, shape: Shape, costs: Costs, ran: PredictedPlan, peak_bytes: int
    ) -> None:
        """Corrected costs err upwards: a plan that ran within the budget goes on if none fits."""
        if peak_bytes > self.budget:
            return
        try:
            self._planned(shape, costs, self.budget)
        except InfeasibleBudgetError:
            fixed = costs.fixed.total(shape.run_steps)
            self._keep(shape, fixed, replace(ran, predicted_peak_bytes=peak_bytes))

    def fitting(self, shape: Shape, costs: Costs) -> PredictedPlan:
        """A plan that fits.

        Raises:
            InfeasibleBudgetError: There is none.
        """
        try:
            whole = self._planned(shape, costs, self.budget)
        except InfeasibleBudgetError as error:
            if self.promised or shape.num_steps > self._longest_seen:
                raise self.explained(error, shape, costs) from None
            _log.warning("windows take slightly more than was free at first: %s", error)
            return self._planned(shape, costs, error.smallest_budget_bytes or 0)
        if not self.finds_fastest:  # a fixed strategy has but one plan
            return whole
        if self._room is not None:
            return self._in_less_room(shape, costs, self._room)
        return self._beside_reserve(shape, costs, whole) if self._reserve else whole

    def shrink(self, shape: Shape, costs: Costs) -> bool:
        """Halve what states and leaves may take; whether plans then take less than before."""
        before = _leaf_peak(shape, costs, self.chosen(shape, costs))
        self._room = max(0, before - costs.fixed.total(shape.run_steps)) // 2
        self.forget()
        return _leaf_peak(shape, costs, self.chosen(shape, costs)) < before

    def forget(self) -> None:
        """Make plans anew."""
        self._plans.clear()
        self._confirmed.clear()

    def follow(self, strategy: Strategy) -> None:
        """Choose schedules by a fixed strategy from here on; the budget stays as it is."""
        self.strategy, self.finds_fastest = strategy, False
        self.forget()

    def replan(
        self, start: int, stop: int, num_losses: int, beside_bytes: int, costs: Costs
    ) -> PredictedPlan:
        """A plan of some steps of a window, with what else is there at the time."""
        return plan(
            stop - start,
            replace(costs, update_bytes=0, fixed=FixedBytes(other=beside_bytes)),
            budget_bytes=self.budget,
            new_steps=num_losses,
            first=start,
        )

    def explained(
        self, error: InfeasibleBudgetError, shape: Shape, costs: Costs
    ) -> InfeasibleBudgetError:
        """The planner's error about a window of that shape as one about `memory_budget`."""
        assert error.smallest_budget_bytes is not None
        smallest = error.smallest_budget_bytes + self.slack.num_bytes
        optimal = error.optimal_budget_bytes and error.optimal_budget_bytes + self.slack.num_bytes
        given = self._amount.described(self.budget + self.slack.num_bytes)
        libraries = costs.fixed.libraries
        of_it = f", {format_bytes(libraries)} of it what libraries keep" if libraries else ""
        who, choices = "", [f"raise it to {smallest} bytes{self._amount.kind}"]
        if not self.finds_fastest:
            who = f" under strategy={self.strategy}"
            choices.append(f"use strategy='optimal', which works from {optimal} bytes")
        elif error.largest_steps:
            choices.append(f"lower k2 to {error.largest_steps}")
        return InfeasibleBudgetError(
            f"memory_budget={given} is below the {format_bytes(smallest)} that a reach of "
            f"{shape.num_steps} steps needs{who}{of_it}{self.slack.note()}; "
            f"{', or '.join(choices)}",
            smallest_budget_bytes=smallest,
            optimal_budget_bytes=optimal,
            largest_steps=error.largest_steps,
        )

    def refusal(
        self, error: InfeasibleBudgetError, shape: Shape, costs: Costs
    ) -> InfeasibleBudgetError:
        """The error about a window whose rest does not fit, or about the whole if it does not."""
        try:
            self._planned(shape, costs, self.budget)
        except InfeasibleBudgetError as whole:
            error = whole
        return self.explained(error, shape, costs)

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "budget_bytes": self.budget_bytes,
            "slack_bytes": self.slack.num_bytes,
            "room_bytes": self._room,
            "reserve": self._reserve,
            "plans": [
                {
                    "shape": asdict(shape),
                    "fixed_bytes": fixed_bytes,
                    "plan": plan.to_dict(),
                    "confirmed": shape in self._confirmed,
                }
                for shape, (fixed_bytes, plan) in self._plans.items()
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the same plans; a budget in bytes stays as it is given now."""
        self.budget_bytes = self._amount.num_bytes or state["budget_bytes"]
        # Older ones have neither of the two.
        self.slack = Slack(self._amount.is_reserved, state.get("slack_bytes", 0))
        self._room = state.get("room_bytes")
        self._reserve = state["reserve"]
        for entry in state["plans"]:
            plain = {"cuts": 0, **entry["shape"]}  # older ones have none
            plain |= {"joints": tuple(plain["joints"]), "cuts": Cuts(plain["cuts"])}
            shape = Shape(**plain)
            self._plans[shape] = entry["fixed_bytes"], PredictedPlan.from_dict(entry["plan"])
            if entry["confirmed"]:
                self._confirmed.add(shape)

    @property
    def budget(self) -> int:
        """What the run's tensors may take, in bytes."""
        assert self.budget_bytes is not None, "it is fixed before the first plan"
        return self.budget_bytes - self.slack.num_bytes

    def _keep(self, shape: Shape, fixed_bytes: int, plan: PredictedPlan) -> None:
        self._plans[shape] = fixed_bytes, plan
        while len(self._plans) > _MOST_CACHED:
            self._plans.popitem(last=False)

    def _within_budget(self, shape: Shape, costs: Costs) -> PredictedPlan:
        chosen = self.fitting(shape, costs)
        self._longest_seen = max(self._longest_seen, shape.num_steps)
        return chosen

    def _in_less_room(self, shape: Shape, costs: Costs, room: int) -> PredictedPlan:
        """The fastest plan in so much room, or the one that takes least, updates aside."""
        fixed, lean = costs.fixed.total(shape.run_steps), replace(costs, update_bytes=0)
        try:
            plan = self._planned(shape, lean, fixed + room)
        except InfeasibleBudgetError as error:
            plan = self._planned(shape, lean, error.smallest_budget_bytes or 0)
        peak = max(plan.predicted_peak_bytes, fixed + costs.update_bytes)
        return replace(plan, predicted_peak_bytes=peak)

    def _beside_reserve(self, shape: Shape, costs: Costs, whole: PredictedPlan) -> PredictedPlan:
        """A plan that leaves as much of the reserve as is worth its price; `whole` leaves none."""
        free = max(0, self.budget - costs.fixed.total(shape.run_steps))
        affordable = _PRICE_OF_RESERVE * whole.predicted_seconds
        for share in _LESS_OF_RESERVE:
            reserved = int(share * self._reserve * free)
            try:
                chosen = self._planned(shape, costs, self.budget - reserved)
            except InfeasibleBudgetError:
                continue
            if chosen.predicted_seconds <= affordable:
                return chosen
        return whole

    def _planned(self, shape: Shape, costs: Costs, budget_bytes: int) -> PredictedPlan:
        return plan(
            shape.num_steps,
            costs,
            budget_bytes=max(1, budget_bytes),
            strategy=OPTIMAL if self.finds_fastest else self.strategy,
            new_steps=shape.new_steps,
            lead_steps=shape.lead_steps,
            joints=shape.joints,
            parted=self._parted,
        )


def _leaf_peak(shape: Shape, costs: Costs, plan: PredictedPlan) -> int:
    """Bytes at the peak of a shape's plan before its update."""
    return simulate(
        plan.schedule,
        replace(costs, update_bytes=0),
        given=[plan.lead_steps + joint for joint in shape.joints],
        advance_steps=plan.advance_steps,
        loss_start=shape.run_steps - shape.new_steps,
    ).peak_bytes
