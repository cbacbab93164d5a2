"""Keeps the windows of a run within bytes: measures what they take, plans, corrects."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from tbptt_ckpt.budget.fitting import FittingPlans
from tbptt_ckpt.budget.found_gradients import enough_for_both
from tbptt_ckpt.budget.irregular import cuts_within_leaves
from tbptt_ckpt.budget.probe import ChangingStateError
from tbptt_ckpt.budget.watched_window import WatchedWindow, watched
from tbptt_ckpt.budget.window_budget import (
    PlannedWindow,
    Request,
    Shape,
    WindowBudget,
    smaller_strategy,
)
from tbptt_ckpt.budget.window_costs import WindowCosts
from tbptt_ckpt.errors import InfeasibleBudgetError
from tbptt_ckpt.executor.storage import Storage
from tbptt_ckpt.memory.exhausted import empty_cache
from tbptt_ckpt.memory.meter import Lap
from tbptt_ckpt.memory.sizes import format_bytes
from tbptt_ckpt.schedule.costs import Costs
from tbptt_ckpt.schedule.forms import FormSeconds
from tbptt_ckpt.schedule.plan import PredictedPlan
from tbptt_ckpt.schedule.strategies import SHORT_WINDOW_STEPS, Auto, Optimal, Strategy
from tbptt_ckpt.schedule.windows import Window
from tbptt_ckpt.time_batching.policy import TimeBatching
from tbptt_ckpt.updates.updater import Updater

_log = logging.getLogger("tbptt_ckpt")

_MOST_METERED = 8  # windows; overlaps that grow make a new plan for each
_MUCH_LONGER = 2  # than any metered one: measured all the same, as its plan is of another kind


class MeasuredBudget(WindowBudget):
    """Plans windows from measured costs, and holds measured windows against their plans.

    Args:
        plans: Makes them.
        costs: What the module takes; None to have it measured at the first window. Where a
            budget is promised, given bytes are held against a few short segments first.
        updater: Whose state and transients count.
        parameters: The weights.
        batching: In which form steps run; where "auto" leaves that open, plans from the measured
            costs of each decide.
        storage: How states are kept.

    Attributes:
        is_measured: Whether what windows take, `window_costs`, could be measured.
    """

    def __init__(
        self,
        plans: FittingPlans,
        costs: Costs | None,
        updater: Updater,
        parameters: Sequence[nn.Parameter],
        batching: TimeBatching,
        storage: Storage = Storage(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(plans.strategy)
        self._plans = plans
        self.window_costs = self._costs = WindowCosts(
            costs, self._plans.promised, updater, parameters, batching, storage
        )
        self._num_metered, self._longest_metered, self.is_measured = 0, 0, True
        self._last: tuple[Shape, Costs] | None = None  # planned

    @property
    def costs(self) -> Costs | None:
        """What the module takes; None before it has been measured, unless it was given."""
        return self._costs.known

    @property
    def has_measured(self) -> bool:
        """Whether the form of steps was decided by what was measured."""
        return self.is_measured and self._costs.are_measured

    def plans_by_costs(self, request: Request) -> bool:
        """Whether the window's plan follows from costs, known ones or such as are measured now."""
        is_short = not self._plans.promised and request.shape.run_steps <= SHORT_WINDOW_STEPS
        cannot = self._costs.must_measure and (is_short or not self.can_meter(request.device))
        return self.is_measured and not cannot

    def room(self, request: Request) -> int:
        """What segments may take beside what there is; fixes the budget."""
        held_bytes, recorded = _held_bytes(request), request.bytes_of(*request.recorded)
        live_bytes = held_bytes + recorded + request.input_bytes
        budget_bytes = self._plans.fix_budget(live_bytes, request.device)
        return budget_bytes - held_bytes - request.input_bytes

    @property
    def forms(self) -> FormSeconds:
        """Forms of steps that were weighed, with predicted seconds of the largest window."""
        return self._costs.forms

    @property
    def budget_bytes(self) -> int | None:
        """The budget; None before the first window."""
        return self._plans.budget_bytes

    def plan(
        self, window: Window, joints: Sequence[int], make_request: Callable[[], Request]
    ) -> PlannedWindow:
        """The window's plan; measures costs if there are none yet."""
        if not self.is_measured:
            return super().plan(window, joints, make_request)
        request = make_request()
        if not self.plans_by_costs(request):
            fixed = not self._plans.finds_fastest or isinstance(self.strategy, Auto)
            unmeasured = WindowBudget(self.strategy if fixed else Auto())
            return unmeasured.plan(window, joints, make_request)
        if self._costs.take_irregular(request):
            self._plans.forget()
        held_bytes = _held_bytes(request)
        try:
            shape, costs, chosen = self._chosen(request, held_bytes)
        except InfeasibleBudgetError as error:
            known, users_clear = self._costs.known, self._costs.users_clear
            if known is None or not (request.is_only and users_clear):
                raise
            costs_of = partial(self._costs.of, known, request.shape, request, held_bytes)
            raise enough_for_both(error, self._plans, request.shape, costs_of) from None
        except ChangingStateError as error:
            self._do_without_costs()
            ignored = ", and memory_budget is not looked at" if self._plans.promised else ""
            how = "strategy='sqrt'" if isinstance(self.strategy, Auto) else self.strategy
            _log.warning("%s; windows are cut as by %s%s", error, how, ignored)
            return super().plan(window, joints, make_request)
        self._last = shape, costs
        # So many windows were measured, of such lengths, that one more tells nothing.
        has_seen_alike = (
            self._num_metered >= _MOST_METERED
            and shape.run_steps < _MUCH_LONGER * self._longest_metered
        )
        is_known = has_seen_alike or self._plans.is_confirmed(shape)
        if is_known or not self._plans.promised or not self.can_meter(request.device):
            return PlannedWindow(chosen)
        exists = self._costs.optimizer_bytes()
        return watched(request, shape, chosen, costs, exists, self._plans, self._refusal)

    def _chosen(self, request: Request, held_bytes: int) -> tuple[Shape, Costs, PredictedPlan]:
        """A plan, cut as its leaves are cut and of no leaf that is longer than known ones foretell.

        With it, the shape and the costs that it is made from.
        """
        shape, known = request.shape, self._prepared(request, held_bytes)
        while True:
            costs = self._costs.of(known, shape, request, held_bytes)
            chosen = self._plans.chosen(shape, costs).at(request.window.first)
            cuts = cuts_within_leaves(chosen, request)
            if cuts > shape.cuts:
                shape = replace(shape, cuts=cuts)
                continue
            is_foretold = self._costs.foretell(chosen.longest_leaf)
            if not self._plans.promised or is_foretold or not self.can_meter(request.device):
                return shape, costs, chosen
            room = self._plans.budget - held_bytes - request.input_bytes
            self._costs.meter_longer(request, room, chosen.longest_leaf)
            self._plans.forget()
            known = self._prepared(request, held_bytes)

    def learn(
        self, planned: PlannedWindow, update: Lap, peak_bytes: int, reserved_bytes: int | None
    ) -> None:
        """Correct the costs by a measured window; the plans made from wrong ones are dropped."""
        known = self._costs.known
        if not isinstance(planned, WatchedWindow) or known is None:
            return
        shape = planned.shape
        self._num_metered += 1
        self._longest_metered = max(self._longest_metered, shape.run_steps)
        costs = self._costs.corrected(planned, known)
        fixed = self._costs.with_optimizer(planned.costs).fixed.total(shape.run_steps)
        if update.peak_bytes > fixed + costs.update_bytes:
            costs = replace(costs, update_bytes=update.peak_bytes - fixed)
        is_right = costs == known
        _log.info(
            "predicted %s, measured %s%s",
            format_bytes(planned.plan.predicted_peak_bytes),
            format_bytes(peak_bytes),
            "" if is_right else "; costs corrected",
        )
        if self._plans.reserves_too_much(reserved_bytes, peak_bytes):
            empty_cache()  # what this plan made the allocator keep is none of the next one's
        elif is_right and self._plans.confirm(shape):
            return
        self._costs.adopt(costs)
        self._plans.start_over()
        if not planned.rest:
            self._keep_what_ran(planned, costs.update_bytes, update)

    def shrink(self, window: Window) -> str | None:
        """Plan with less from here on; a promised budget stays, and what is said tells if not."""
        if self._last is None or not self.costs:
            return self._shrunk_unmeasured(window)
        shape, costs = self._last
        if self._plans.finds_fastest:
            if not self._plans.shrink(shape, costs):
                return None
            peak = self._plans.chosen(shape, costs).predicted_peak_bytes
            return f"{self.strategy} within {format_bytes(peak)}"
        smaller = smaller_strategy(self.strategy, window)
        while smaller is not None:
            self._follow(smaller)
            try:
                self._plans.fitting(shape, costs)
            except InfeasibleBudgetError:
                smaller = smaller_strategy(smaller, window)
            else:
                return str(smaller)
        return None

    def _follow(self, strategy: Strategy) -> None:
        super()._follow(strategy)
        self._plans.follow(strategy)

    def state_dict(self) -> dict[str, Any]:
        """Costs and plans as plain data; empty before the first window."""
        if not self.costs or not self.is_measured:
            return {}
        return {
            **self._costs.state_dict(),
            **self._plans.state_dict(),
            "num_metered": self._num_metered,
            "longest_metered": self._longest_metered,
        }

    def load_state_dict(self, state: Mapping[str, Any], used: str | None = None) -> None:
        """Go on with the same costs and plans; a budget in bytes stays as it is given now."""
        if state:
            self._costs.load_state_dict(state)
            self._plans.load_state_dict(state)
            self._num_metered = state["num_metered"]
            self._longest_metered = state.get("longest_metered", 0)  # older ones do not say
        else:
            self.is_measured = used in (None, str(self.strategy))
        super().load_state_dict(state, used)

    def _refusal(self, ran: WatchedWindow, error: InfeasibleBudgetError) -> InfeasibleBudgetError:
        """What to raise in a window whose rest does not fit, before anything exceeds the budget."""
        assert self.costs is not None, "the window was planned from costs"
        self._costs.adopt(self._costs.corrected(ran, self.costs))  # another try knows at once
        self._plans.start_over()
        return self._plans.refusal(error, ran.shape, self._costs.corrected(ran, ran.costs))

    def _prepared(self, request: Request, held_bytes: int) -> Costs:
        """Fix the budget, know the costs, and make sure that larger windows will fit."""
        fullest, room = request.fullest, self.room(request)

        def planned(costs: Costs) -> PredictedPlan:
            of_fullest = self._costs.of(costs, fullest, request, held_bytes)
            return self._plans.fitting(fullest, of_fullest)

        finds_fastest = self._plans.finds_fastest
        is_new = self._costs.must_measure
        costs = self._costs.prepare(request, room, planned if finds_fastest else None)
        if is_new:  # caches are empty: what is reserved beside the run will be
            recorded = request.bytes_of(*request.recorded)
            self._plans.slack.begins_beside(held_bytes + recorded + request.input_bytes)
        self._plans.check_fullest(fullest, self._costs.of(costs, fullest, request, held_bytes))
        return costs

    def _keep_what_ran(self, ran: WatchedWindow, update_bytes: int, update: Lap) -> None:
        """Let a plan go on that ran within the budget, where the corrected costs have none."""
        made = self._costs.optimizer_bytes() - ran.optimizer_bytes
        peak = max(ran.peak_bytes + made, update.peak_bytes) + ran.absent_bytes
        costs = self._costs.with_optimizer(self._costs.corrected(ran, ran.costs))
        costs = replace(costs, update_bytes=update_bytes)
        self._plans.keep_what_ran(ran.shape, costs, ran.plan, peak)

    def _shrunk_unmeasured(self, window: Window) -> str | None:
        """The next smaller strategy, where there was no memory to measure what windows take."""
        self._do_without_costs()
        smaller = super().shrink(window)
        words = (
            ", and memory_budget is not looked at any more, since there was no memory to measure "
            "what windows take"
        )
        return smaller and (smaller + words if self._plans.promised else smaller)

    def _do_without_costs(self) -> None:
        if isinstance(self.strategy, Optimal):  # which is nothing without them
            self._follow(Auto())
        self.is_measured = False


def _held_bytes(request: Request) -> int:
    """What is live before a window whatever it is: states and its steps aside."""
    return request.bytes_of(*request.held) + request.ahead_bytes + request.library_bytes
