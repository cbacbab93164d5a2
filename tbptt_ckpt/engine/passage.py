"""One window's way through the sequence: where it starts, what it notes and leaves."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from tbptt_ckpt.budget.meter import UnmeteredWindow, WindowMeter
from tbptt_ckpt.budget.planned_window import PlannedWindow, Request, Shape, fullest_shape
from tbptt_ckpt.budget.probe import SegmentProbe
from tbptt_ckpt.data.blocks import StepBlock, narrow_blocks
from tbptt_ckpt.engine.initial_state import InitialState
from tbptt_ckpt.engine.parts import Settings
from tbptt_ckpt.engine.records import Records, changes
from tbptt_ckpt.engine.results import Outcome
from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.executor.resets import Resets
from tbptt_ckpt.executor.runner import check_same_structure
from tbptt_ckpt.executor.sinks import WindowLoss
from tbptt_ckpt.executor.task import Boundary, WindowTask, counted_weight, has_loss
from tbptt_ckpt.executor.window_run import WeightGuard, WindowRun
from tbptt_ckpt.module.ambient import Ambient, AmbientState
from tbptt_ckpt.module.hooks import SilenceableHooks
from tbptt_ckpt.module.recurrence import device_of
from tbptt_ckpt.module.trees import (
    Tree,
    check_no_hidden_tensors,
    detach_state,
    relative_change,
    tensors_of,
)
from tbptt_ckpt.schedule.actions import ADVANCE_STEPS
from tbptt_ckpt.schedule.windows import Window, later_starts, window_at


class Passage:
    """One window's way through the sequence: where it starts, what it notes and leaves.

    Args:
        settings: What the user asked for.
        window: The window.
        num_steps: Length of the sequence, None while unknown.
        blocks: The window's steps.
        ambient: Generators and buffers.
        initial: The state at step 0.
        records: What earlier windows left.
    """

    def __init__(
        self,
        settings: Settings,
        window: Window,
        num_steps: int | None,
        blocks: Sequence[StepBlock],
        ambient: Ambient,
        initial: InitialState,
        records: Records,
    ) -> None:
        self._settings, self._window, self._blocks = settings, window, blocks
        self._ambient, self._initial, self._records = ambient, initial, records
        self._resets = Resets(blocks, initial.attached, settings.recurrence.lane_dim)
        self._stale = settings.overlap == "stale"
        k1, k2 = settings.k1, settings.k2
        upcoming = window_at(window.index + 1, num_steps, k1, k2)
        self._num_steps = num_steps
        self._next_start = max(min(upcoming.start, window.stop), records.origin)
        self._later_starts = later_starts(window, num_steps, k1, k2)
        self._keeps_later_starts = self._stale
        ambient.about_to_run()  # whoever got the window before may have run the module
        self._found = ambient.capture()
        self._records.ambients[window.new_start] = self._found
        # The state that an earlier window left is a constant: nobody sees its gradient.
        self._wants_state_grads = window.start == records.origin
        self._noted: dict[int, Boundary] = {}
        self._final: Boundary | None = None
        self.drift = 0.0

    @property
    def final(self) -> Boundary:
        """The state at the window's end."""
        assert self._final is not None, "the window has run"
        return self._final

    def joints(self) -> Sequence[int]:
        """Steps at which a plan may restart, since their states are given."""
        # Nested checkpoints are one graph in the order of time: no block can go before another.
        one_graph = self._settings.executor_name == "checkpoint"
        return () if one_graph else sorted(self._joints())

    def request(self, loss_start: int, held: tuple[object, ...]) -> Request:
        """What a plan of the window has to know."""
        window, settings, records = self._window, self._settings, self._records
        shape = Shape(
            num_steps=window.stop - window.start,
            new_steps=window.num_new_steps,
            joints=tuple(joint - window.start for joint in self.joints()),
            recorded_states=len(records.boundaries),
            coming_states=self._num_coming_states(),
        )
        k1, k2 = settings.k1, settings.k2
        fullest = fullest_shape(shape, window, self._num_steps, k1, k2, stale=self._stale)
        noted = max(fullest.recorded_states, fullest.num_steps // k1)
        return Request(
            window=window,
            shape=shape,
            fullest=fullest,
            held=held,
            recorded=tuple(records.boundaries.values()),
            coming_ambients=max(0, noted - len(records.ambients)),
            makes_first_state=not tensors_of(self._boundary_at(window.first).state),
            blocks=self._blocks,
            make_probe=lambda: self._probe(loss_start),
        )

    def differentiate(
        self,
        loss_start: int,
        guard: WeightGuard,
        grad_scale: float,
        planned: PlannedWindow,
        meter: WindowMeter | UnmeteredWindow,
    ) -> Outcome:
        """Run the window with its gradient."""
        settings, window, plan = self._settings, self._window, planned.plan
        task = self._task(window.first, window.start, loss_start, self._joints())
        loss = WindowLoss(
            settings.loss_function,
            counted_weight(self._blocks, loss_start, window.stop),
            settings.reduction,
        )
        work = self._work(task, loss, guard, plan.advance_steps)
        work.runner = meter.runner(work.runner)
        work.grad_scale = grad_scale
        schedule = meter.schedule(plan.schedule, planned.pilot)
        planned.pilot.attach(partial(setattr, work, "longest_advance"))
        state_grads = settings.executor.run(work, schedule, self._boundary_at(window.first))
        loss_sum = loss.loss_sum
        if state_grads is None or loss_sum is None:
            return Outcome(task.executed_steps)
        self._check_graph(loss, max(loss_start, window.start))
        return Outcome(
            executed_steps=task.executed_steps,
            loss=loss.value,
            loss_sum=loss_sum,
            weight=float(loss.weight),
            state_grads=state_grads,
            grad_scale=work.grad_scale,
            plan=planned.pilot.executed_plan(plan),
        )

    def _num_coming_states(self) -> int:
        """States that the window leaves behind, and the gradient of one."""
        window = self._window
        noted: set[int] = {self._next_start, *(self._later_starts if self._stale else ())}
        earliest = window.new_start if self._stale else window.first
        return 2 + len([step for step in noted if earliest < step < window.stop])

    def _probe(self, loss_start: int) -> SegmentProbe:
        settings, window = self._settings, self._window
        return SegmentProbe(
            runner=settings.runner,
            loss=settings.loss_function,
            blocks=self._blocks,
            ambient=self._ambient,
            parameters=settings.parameters,
            device=device_of(settings.parameters),
            first=window.first,
            stop=window.stop,
            loss_start=loss_start,
            boundary=self._boundary_at(window.first),
            resets=self._resets,
        )

    def _check_graph(self, loss: WindowLoss, start: int) -> None:
        """Raise where plain PyTorch's backward would, because a loss depends on nothing."""
        if not self._wants_state_grads:  # nor would a loss of the first state alone have one
            return
        learns = any(parameter.requires_grad for parameter in self._settings.parameters)
        if learns and not loss.has_graph and has_loss(self._blocks, start, self._window.stop):
            raise ArgumentError(
                "loss_fn returned losses without a graph although there are weights to learn; "
                "outputs or losses must not be detached"
            )

    def only_advance(self, guard: WeightGuard, weights_before: object) -> Outcome:
        """Run a window without targets.

        Under refresh the steps of earlier windows run again if the weights have changed
        since, so that the state handed on is today's. States at which later windows begin
        are kept here, since the next window may not pass them again.
        """
        window, self._keeps_later_starts = self._window, True
        changed = weights_before not in (None, guard.fingerprint())
        rerun = window.start < window.new_start and changed and not self._stale
        first = window.start if rerun else window.new_start
        begin = self._boundary_at(first)
        executed = self._advance(begin, first, window.stop, guard)
        if not self._has_state_for_next_window():
            nearest = self._records.last_at_or_before(self._next_start) or self._boundary_at(
                self._window.first
            )
            executed += self._advance(nearest, nearest.step, self._next_start, guard)
        return Outcome(executed)

    def restore_ambient(self) -> None:
        """Leave generators and buffers as the first run of the new steps left them."""
        self._ambient.restore(self._found if self._final is None else self._final.ambient)

    def hand_on(self, *, ran_again: bool) -> None:
        """Leave to the next windows what they start from.

        Args:
            ran_again: Whether any step has run more than once.
        """
        records, final = self._records, self.final
        # What a new buffer held matters to steps that run again; the run's end asks once more.
        if ran_again or records.carried is None:
            self._ambient.check_complete()
        check_no_hidden_tensors(final.state)
        if records.carried is not None:
            check_same_structure(final.state, records.carried.state)
        if not self._keeps_later_starts:
            records.boundaries.clear()  # their steps ran again, with today's weights
        for boundary in (*self._noted.values(), final):
            records.keep(boundary)
        records.carried = final
        records.drop_before(self._next_start)

    def states(self) -> list[Tree]:
        """The states that later windows start from."""
        return [boundary.state for boundary in (*self._noted.values(), self.final)]

    def num_tokens(self) -> int:
        """Valid new steps of all lanes."""
        new = narrow_blocks(self._blocks, self._window.new_start, self._window.stop)
        return sum(block.num_tokens() for block in new)

    def _has_state_for_next_window(self) -> bool:
        recorded = (
            self._records.origin,
            self._window.stop,
            *self._records.boundaries,
            *self._noted,
        )
        return self._stale or self._next_start in recorded

    def _advance(self, boundary: Boundary, first: int, stop: int, guard: WeightGuard) -> int:
        task = self._task(first, stop, stop, {})
        task.stop = stop
        work = self._work(
            task, WindowLoss(self._settings.loss_function, 0.0, "sum"), guard, ADVANCE_STEPS
        )
        with SilenceableHooks():
            work.advance(boundary, stop)
        return task.executed_steps

    def _task(
        self, first: int, start: int, loss_start: int, joints: dict[int, Boundary]
    ) -> WindowTask:
        window = self._window
        ambients = self._records.ambients_for(first, self._settings.k1)
        stops = {start, window.new_start, self._next_start, *joints, *changes(ambients)}
        earliest = 0 if self._keeps_later_starts else window.new_start
        stops.update(step for step in self._later_starts if step > earliest)
        return WindowTask(
            blocks=self._blocks,
            first=first,
            start=start,
            stop=window.stop,
            loss_start=loss_start,
            ambient=self._ambient,
            stops_at=sorted(s for s in stops if first < s < window.stop),
            ambients=ambients,
            joints=joints,
            resets=self._resets,
            wants_state_grads=self._wants_state_grads,
            on_arrival=self._note_stale if self._stale else self._note_refreshed,
        )

    def _work(
        self, task: WindowTask, loss: WindowLoss, guard: WeightGuard, longest_advance: int
    ) -> WindowRun:
        work = WindowRun(task, self._settings.runner, loss, guard, record=self._settings.record)
        work.observer = self._settings.observer
        work.longest_advance = longest_advance
        return work

    def _joints(self) -> dict[int, Boundary]:
        """Under stale overlap, the recorded states from which blocks restart."""
        window, boundaries, k1 = self._window, self._records.boundaries, self._settings.k1
        if not self._stale or window.start >= window.new_start:
            return {}
        first_joint = (window.start // k1 + 1) * k1
        return {step: boundaries[step] for step in range(first_joint, window.new_start + 1, k1)}

    def _boundary_at(self, step: int) -> Boundary:
        records = self._records
        if step == records.origin:
            state = records.origin_state if records.has_origin_state else self._initial.state
            return Boundary(step, state, records.ambients[step])
        return records.boundaries[step]

    def _note_refreshed(self, step: int, state: Tree, ambient: AmbientState) -> None:
        window = self._window
        if step == window.new_start:
            recorded = self._records.boundaries[step].state
            self.drift = relative_change(state, recorded)
        if step > window.new_start:
            self._records.ambients.setdefault(step, ambient)
        self._note(step, state, ambient)

    def _note_stale(self, step: int, state: Tree, ambient: AmbientState) -> None:
        if step <= self._window.new_start:
            if step % self._settings.k1 == 0:
                recorded = self._records.boundaries[step].state
                self.drift = max(self.drift, relative_change(state, recorded))
            return
        self._records.ambients.setdefault(step, ambient)
        self._note(step, state, ambient)

    def _note(self, step: int, state: Tree, ambient: AmbientState) -> None:
        boundary = Boundary(step, detach_state(state), ambient)
        if step == self._window.stop:
            self._final = boundary
        elif step == self._next_start or (self._keeps_later_starts and step in self._later_starts):
            self._noted[step] = boundary
