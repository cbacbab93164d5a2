"""What a window of some shape takes: costs, measured or given and checked, and corrected."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from tbptt_ckpt.budget.calibrate import calibrate
from tbptt_ckpt.budget.checked_costs import (
    CHECKED_STEPS,
    ROUNDING_BYTES,
    at_least,
    not_below,
    with_host_bytes,
)
from tbptt_ckpt.budget.forms import fastest_form, saved_forms
from tbptt_ckpt.budget.found_gradients import finding_gradients, waiting_bytes
from tbptt_ckpt.budget.irregular import IrregularSteps, cut_at_first_loss
from tbptt_ckpt.budget.kept_states import lacking_bytes
from tbptt_ckpt.budget.lengths import Limits
from tbptt_ckpt.budget.longer import LongLeaf, as_steep_as_may_be, length_to_meter
from tbptt_ckpt.budget.measuring import warm_up
from tbptt_ckpt.budget.stored_states import with_stored_states
from tbptt_ckpt.budget.update_bytes import update_bytes
from tbptt_ckpt.budget.watched_window import WatchedWindow
from tbptt_ckpt.budget.window_budget import Cuts, Request, Shape
from tbptt_ckpt.devices import device_of
from tbptt_ckpt.executor.storage import Storage
from tbptt_ckpt.memory.storages import tensor_bytes
from tbptt_ckpt.schedule.costs import Costs, FixedBytes
from tbptt_ckpt.schedule.curves import Curve, higher
from tbptt_ckpt.schedule.forms import Form, FormSeconds
from tbptt_ckpt.schedule.plan import PredictedPlan
from tbptt_ckpt.time_batching.policy import TimeBatching
from tbptt_ckpt.updates.updater import Updater

_log = logging.getLogger("tbptt_ckpt")


class WindowCosts:
    """Costs of a run's windows.

    Attributes:
        known: What the module takes; None before it has been measured.
        forms: Predicted seconds of the largest window in each form that was weighed; None where
            no plan fits.
    """

    def __init__(
        self,
        given: Costs | None,
        promised: bool,
        updater: Updater,
        parameters: Sequence[nn.Parameter],
        batching: TimeBatching,
        storage: Storage = Storage(),  # noqa: B008 - frozen
    ) -> None:
        self.known, self._promised, self._storage = given, promised, storage
        self._is_checked = given is None or not promised
        self.forms: FormSeconds = {}
        self._measured_first: Costs | None = None  # before any correction
        self._foretold_steps = 0  # up to which leaves take what known costs say
        self._updater, self._parameters, self._batching = updater, parameters, batching
        # Without cuts of segments, with those among losses, and with all.
        self._irregular = [IrregularSteps() for _ in range(3)]

    @property
    def must_measure(self) -> bool:
        """Whether segments have to be run before the first plan."""
        return not self._is_checked or self.known is None

    @property
    def are_measured(self) -> bool:
        """Whether they were measured in the form that steps run in."""
        return self.known is not None and self._measured_first is not None

    @property
    def users_clear(self) -> bool:
        """Whether gradients stay until a user clears them."""
        return self._updater.optimizer is None

    def take_irregular(self, request: Request) -> bool:
        """Count steps that take more; whether plans that were made before know too few."""
        blocks, window = request.blocks, (request.window.first, request.window.stop)
        weighs = any(block.weighs() for block in blocks)
        resets = [step for block in blocks for step in block.reset_steps()]
        late = [cut for cut in request.cuts if cut > request.loss_start]
        is_denser = False
        for each, cuts in zip(self._irregular, ((), late, request.cuts), strict=True):
            is_denser |= each.take(resets, cuts, window, weighs=weighs)
        return is_denser

    def prepare(
        self, request: Request, room_bytes: float, planned: Callable[[Costs], PredictedPlan] | None
    ) -> Costs:
        """What the module takes, measured or checked now if it has not been.

        Args:
            request: The window at hand.
            room_bytes: What segments may take.
            planned: The plan that counts under some costs of the largest window, where steps may
                run in the form that takes the least time; None for a fixed strategy.
        """
        reach = request.shape.run_steps
        self.known = self.known and with_stored_states(self._storage, self.known, request.device)
        if self.known is None:
            limits = Limits(reach, room_bytes=room_bytes)
            if planned is None:
                self.known = self._measured(request, limits)
            else:
                self.known = self._of_fastest_form(request, limits, planned)
            self._measured_first = self.known
        elif not self._is_checked:
            short = Limits(min(reach, CHECKED_STEPS), max_seconds=0.0, room_bytes=room_bytes)
            found = self._measured(request, short)
            self.known = at_least(self.known, found, max(reach, request.fullest.run_steps))
        self._is_checked = True
        return self.known

    def foretell(self, steps: int) -> bool:
        """Whether known costs stand for leaves of so many steps."""
        assert self.known is not None, "there are costs"
        return steps <= max(self._foretold_steps, self.known.metered_steps)

    def meter_longer(self, request: Request, room_bytes: float, planned_steps: int) -> None:
        """Meter a leaf longer than known ones, or expect the most of it if there is no room.

        Args:
            request: The window at hand.
            room_bytes: What segments may take.
            planned_steps: Steps of the longest leaf that its plan has.
        """
        known = self.known
        assert known is not None, "there are costs"
        steps = length_to_meter(known, planned_steps, request.shape.run_steps, room_bytes)
        if steps is None:
            self.known, self._foretold_steps = as_steep_as_may_be(known), sys.maxsize
            return
        with self._updater.deliveries.of(self._parameters):  # of nothing: no hook runs
            found = LongLeaf.of(request.make_probe(), steps)
        self._foretold_steps, self.known = found.stands_for(known), found.raise_costs(known)
        self._measured_first = self._measured_first and found.raise_costs(self._measured_first)
        _log.info("measured a leaf of %d steps, as a plan has one of %d", steps, planned_steps)

    def of(
        self,
        costs: Costs,
        shape: Shape,
        request: Request,
        held_bytes: int,
        finds: bool | None = None,
    ) -> Costs:
        """Costs with the fixed part as it is in a window of some shape, which `finds` gradients."""
        fixed, costs = costs.fixed, self._with_irregular(costs, shape.cuts)
        if shape.new_steps < shape.num_steps:
            costs = cut_at_first_loss(costs, shape.new_steps)
        if not self._promised and request.device.type == "cpu":
            costs = with_host_bytes(costs)  # what is free is so for both
        exists = self.optimizer_bytes()
        deliveries = self._updater.deliveries
        trained = [w for w in deliveries.wholes(self._parameters) if w.requires_grad]
        states = max(request.fullest.recorded_states, shape.recorded_states) + shape.coming_states
        state_bytes = states * costs.state_bytes + request.coming_ambients * costs.ambient_bytes
        # A gradient of what is handed on, and what a first state does not have.
        state_bytes += costs.handed_on_bytes
        state_bytes += lacking_bytes(request.first_state, costs, request.device)
        # Without an optimizer users may have cleared them; a later window finds this one's.
        is_first = request.is_only and request.absent_gradient_bytes == tensor_bytes(trained)
        waiting = waiting_bytes(self._updater, self._parameters)
        found = replace(
            costs,
            # Between leaves of windows: steps are read, and gradients are handed over one by
            # one, each to a hook that may make another of it; buckets are made anew once.
            update_bytes=max(
                costs.update_bytes,
                request.reading_bytes(shape.run_steps),
                2 * max(waiting, default=0),
                deliveries.gathered_bytes(trained),
            ),
            fixed=FixedBytes(
                weights=held_bytes - exists - request.library_bytes,
                gradients=fixed.gradients or tensor_bytes(trained),
                optimizer=max(exists, fixed.optimizer),
                states=state_bytes,
                step_inputs=request.input_bytes / request.shape.run_steps,
                other=fixed.other + 2 * ROUNDING_BYTES,
                libraries=request.library_bytes,
            ),
        )
        if finds is None:
            finds = not (self._updater.clears_gradients or is_first)
        beside = sum(waiting) + 2 * request.learned_bytes
        return finding_gradients(found, beside) if finds else found

    def _with_irregular(self, costs: Costs, which: Cuts) -> Costs:
        """Costs of leaves with the most irregular steps; quiet ones have the cuts before losses."""
        regular, late, all_cuts = self._irregular
        loud = late if which is Cuts.ALL else regular
        cut = regular if which is Cuts.NONE else all_cuts
        quiet, weighed = costs.quiet, costs.weighed_step_bytes
        spared = quiet.beyond_graph if quiet is not None else _nothing

        def added(curve: Curve) -> Curve:
            return loud.added(curve, costs.irregular_bytes, spared, weighed)

        def last(curve: Curve) -> Curve:
            # What is held of a gradient becomes it, a fixed byte; the next part comes beside.
            return cut.added(curve, costs.irregular_bytes, spared, weighed)

        if quiet is None:
            return costs.with_leaves(added, last)
        more, graph = quiet.irregular, quiet.graph
        quiet = replace(quiet, graph=None).changed(lambda curve: cut.added(curve, more, spared))
        quiet = replace(quiet, graph=graph and cut.added(graph, more, _nothing))

        def raised(curve: Curve) -> Curve:
            return higher(added(curve), quiet.leaf)  # what planners take it for

        loud_leaves = added if which is Cuts.NONE else raised
        return replace(costs.with_leaves(loud_leaves, last), quiet=quiet)

    def corrected(self, window: WatchedWindow, costs: Costs) -> Costs:
        """Costs that would have predicted a window, and no less than was measured at first.

        A window may have leaves of one length alone: that they took less says nothing of others.
        """
        return not_below(window.corrected(costs), self._measured_first)

    def adopt(self, costs: Costs) -> None:
        """Plans follow from these from here on."""
        self.known = costs

    def with_optimizer(self, costs: Costs) -> Costs:
        """The costs with the optimizer's state as large as it is now, if that is more."""
        largest = max(costs.fixed.optimizer, self.optimizer_bytes())
        return replace(costs, fixed=replace(costs.fixed, optimizer=largest))

    def optimizer_bytes(self) -> int:
        """State of the optimizer that exists, where the weights are."""
        device = device_of(self._parameters or self._updater.optimized())
        return tensor_bytes(self._updater.optimizer, device=device)

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        assert self.known is not None, "there are costs"
        return {
            "costs": self.known.to_dict(),
            "measured_first": self._measured_first and self._measured_first.to_dict(),
            "foretold_steps": self._foretold_steps,
            "form": self._batching.form,
            "forms": [list(each) for each in self.forms.items()],
            "irregular": [each.state_dict() for each in self._irregular],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the same costs, in the same form."""
        self.known, self._is_checked = Costs.from_dict(state["costs"]), True
        first = state.get("measured_first")  # older ones have none
        self._measured_first = first and Costs.from_dict(first)
        self._foretold_steps = state.get("foretold_steps", 0)  # older ones do not say
        for each, found in zip(self._irregular, state.get("irregular", ()), strict=False):
            each.load_state_dict(found)  # older ones have none
        self.forms = saved_forms(state, self._batching)

    def _of_fastest_form(
        self, request: Request, limits: Limits, planned: Callable[[Costs], PredictedPlan]
    ) -> Costs:
        """Measured costs in the form of steps whose plan takes the least time."""
        probe = request.make_probe()
        asked: Form | None = "compiled" if probe.runner.compiled.is_asked else None
        if len(forms := probe.runner.forms()) == 1:
            self._batching.decide(*forms)
            return self._measured(request, limits)
        with self._updater.deliveries.of(self._parameters):  # of nothing: no hook runs
            warm_up(probe)
        costs, self.forms = fastest_form(
            self._batching,
            probe.runner.forms(),  # as a first step has shown them
            limits.max_seconds,
            lambda seconds: self._measured(request, replace(limits, max_seconds=seconds)),
            planned,
            asked=asked,
        )
        return costs

    def _measured(self, request: Request, limits: Limits) -> Costs:
        update = update_bytes(self._updater, copies_weights=request.copies_weights)
        with self._updater.deliveries.of(self._parameters):  # of nothing: no hook runs
            probe = request.make_probe()
            return calibrate(probe, limits, update, FixedBytes(), self._storage)


def _nothing(steps: int) -> float:
    """What shorter pieces spare of a graph."""
    return 0.0
