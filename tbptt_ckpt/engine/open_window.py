"""One window of a run: what it starts from, how it is run, and what it leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from tbptt_ckpt.budget.meter import UnmeteredWindow, WindowMeter
from tbptt_ckpt.budget.probe import SegmentProbe
from tbptt_ckpt.budget.window_budget import PlannedWindow, Request
from tbptt_ckpt.data.blocks import StepBlock, narrow_blocks
from tbptt_ckpt.data.window_reader import WindowReader
from tbptt_ckpt.engine.initial_state import InitialState
from tbptt_ckpt.engine.options import Options
from tbptt_ckpt.engine.parts import Parts
from tbptt_ckpt.engine.records import Notes, Records
from tbptt_ckpt.engine.window_numbers import WindowNumbers
from tbptt_ckpt.engine.window_shapes import shapes_of
from tbptt_ckpt.executor.borders import Borders
from tbptt_ckpt.executor.boundary import Boundary, check_same_structure
from tbptt_ckpt.executor.guard import WeightGuard
from tbptt_ckpt.executor.observer import Observer
from tbptt_ckpt.executor.resets import Resets
from tbptt_ckpt.executor.runner import Runner
from tbptt_ckpt.executor.window_loss import NO_LOSS, WindowLoss, has_loss
from tbptt_ckpt.executor.window_pass import StateGrads, WindowPass
from tbptt_ckpt.module.ambient import Ambient, AmbientState
from tbptt_ckpt.module.hooks import SilenceableHooks
from tbptt_ckpt.module.trees import Tree
from tbptt_ckpt.schedule.actions import ADVANCE_STEPS
from tbptt_ckpt.schedule.truncation import Draw
from tbptt_ckpt.schedule.windows import joint_steps


class OpenWindow:
    """One window, from its first state to what later windows start from.

    `draw` says how far back it goes; `initial` is the state at step 0; `records` is what earlier
    windows left, generators and buffers at the window's new steps among them.

    Attributes:
        loss: Its loss, once it has run.
        executed_steps: Module steps run for it.
        notes: What was noted in passing.
        numbers: What is read of it.
        draw: How far back it goes: all the way where it has no loss.
        borders: Where its gradient was divided.
    """

    def __init__(
        self,
        options: Options,
        parts: Parts,
        draw: Draw,
        num_steps: int | None,
        blocks: Sequence[StepBlock],
        ambient: Ambient,
        initial: InitialState,
        records: Records,
        observer: Observer,
    ) -> None:
        self._options, self._parts, window = options, parts, draw.whole
        self._window, self._num_steps, self._blocks = window, num_steps, blocks
        self._ambient, self._initial, self._records = ambient, initial, records
        self._observer = observer
        self._resets = Resets(blocks, initial.attached, parts.recurrence.lane_dim)
        self._loss_start = options.loss_start(window)
        self.numbers = WindowNumbers(parts.updater, initial, observer)
        self.draw = draw = draw if self.has_loss() else draw.without_loss()
        self.notes = Notes(options, draw, num_steps, records, self.numbers)
        self._reached = draw.window  # what is differentiated of it
        self.borders = Borders(draw.divisors, self.numbers, stops=draw.stops)
        # Nobody sees the gradient of a state that an earlier window left.
        self._wants_state_grads = self._reached.start == records.origin
        self.loss: WindowLoss = NO_LOSS
        self.executed_steps = 0

    @property
    def ran_again(self) -> bool:
        """Whether any step has run more than once."""
        return self.executed_steps > self._window.num_new_steps

    def has_loss(self) -> bool:
        """Whether any step has a target that counts."""
        return has_loss(self._blocks, self._loss_start, self._window.stop)

    def joints(self) -> Sequence[int]:
        """Steps at which a plan may restart, since their states are given."""
        # In one graph, which is in the order of time, no block can go before another.
        return () if self._parts.executor.one_graph else self._joint_steps()

    def request(
        self, reader: WindowReader, held: tuple[object, ...], copies_weights: bool
    ) -> Request:
        """What a plan of the window has to know."""
        window, records, reached = self._window, self._records, self._reached
        state, parts = self._boundary_at(reached.first).state, self._parts
        given = self._options, self.draw, self._num_steps, records, self._joint_steps()
        shape, fullest, coming_ambients = shapes_of(*given)
        return Request(
            window=reached,
            shape=shape,
            fullest=fullest,
            held=held,
            recorded=tuple(records.boundaries.values()),
            coming_ambients=coming_ambients,
            first_state=state,
            is_only=window.new_start == 0 and window.stop == self._num_steps,
            learned_bytes=self._initial.learned_bytes(),
            absent_gradient_bytes=parts.absent_gradient_bytes(),
            ahead_bytes=reader.ahead_bytes(window.stop),
            reading_bytes=reader.beside_bytes,
            copies_weights=copies_weights,
            library_bytes=parts.library_bytes(),
            runs_by_parts=parts.runner.parts.look(self._blocks, reached.first, state, ahead=True),
            loss_start=self._loss_start,
            cuts=self._cuts(),
            blocks=self._blocks,
            device=parts.device,
            make_probe=self._probe,
        )

    def differentiate(
        self,
        guard: WeightGuard,
        grad_scale: float | Tensor,
        planned: PlannedWindow,
        meter: WindowMeter | UnmeteredWindow,
        put_back: Callable[[], None],
    ) -> StateGrads | None:
        """Run the window with its gradient; the gradients of its first state."""
        window, options, parts = self._reached, self._options, self._parts
        first, found = self._boundary_at(window.first), self._records.ambients[window.new_start]
        if self.draw.audited and not options.is_stale:  # leaves begin at states of today
            longest = min(planned.plan.advance_steps, planned.plan.longest_leaf)
            self._advance(first, window.new_start, guard, longest)
        loss = WindowLoss(
            parts.loss_function, self._blocks, self._loss_start, window.stop, options.reduction
        )
        this_pass = self._pass(
            window.first, window.start, window.stop, guard, parts.runner, loss, grad_scale
        )
        route = meter.route(planned)
        grads = parts.executor.run(this_pass, route, first)
        parts.cuts.check(this_pass, first, found, self.notes.left)
        self.executed_steps += this_pass.executed_steps
        this_pass.completed()  # where the executor has not told
        if grads is None or loss.is_empty() or not loss.has_losses:
            put_back()  # a device's count shows only now that nothing counted
            self.numbers.drop_loss()
            return None
        if self._wants_state_grads:  # else a loss of the first state alone would have no graph
            loss.check_graph(parts.parameters)
        self.loss = loss
        return grads

    def begins_with(self) -> tuple[Sequence[StepBlock], Tree, int | None]:
        """Its steps, its first state, and the steps of the sequence."""
        return self._blocks, self._boundary_at(self._window.first).state, self._num_steps

    def only_advance(self, guard: WeightGuard, weights_before: object) -> None:
        """Run a window without targets.

        Under refresh earlier steps run again if weights have changed since: the state handed on
        is today's. States at which later windows begin are kept: the next may not pass them again.
        """
        window, start = self._window, self._reached.start
        changed = weights_before not in (None, guard.fingerprint())
        rerun = start < window.new_start and changed and not self._options.is_stale
        self.notes.keep_all(ran_again=rerun)
        first = start if rerun else window.new_start
        self._advance(self._boundary_at(first), window.stop, guard)
        if not self.notes.has_next_start():
            next_start = self.notes.next_start
            nearest = self._records.last_at_or_before(next_start)
            self._advance(nearest or self._boundary_at(window.first), next_start, guard)
        self.numbers.complete(NO_LOSS, self.notes.states())

    def restore_ambient(self) -> None:
        """Leave generators and buffers as the first run of the new steps left them."""
        self._ambient.restore(self.notes.left)

    def hand_on(self) -> None:
        """Leave to the next windows what they start from."""
        records, final = self._records, self.notes.final
        # What a new buffer held matters to steps that run again; the run's end asks once more.
        if self.ran_again or records.carried is None:
            self._ambient.check_complete()
        if records.carried is not None:
            check_same_structure(final.state, records.carried.state)
        self.notes.hand_on()

    def num_tokens(self) -> int:
        """Valid new steps of all lanes."""
        blocks = narrow_blocks(self._blocks, self._window.new_start, self._window.stop)
        return sum(block.num_tokens() for block in blocks)

    def beside_bytes(self, reader: WindowReader) -> int:
        """Bytes of its steps, of those that have been read ahead, and of what libraries keep."""
        steps = sum(block.num_bytes() for block in self._blocks)
        return steps + reader.ahead_bytes(self._window.stop) + self._parts.library_bytes()

    def _pass(
        self,
        first: int,
        start: int,
        stop: int,
        guard: WeightGuard,
        runner: Runner,
        loss: WindowLoss = NO_LOSS,
        grad_scale: float | Tensor = 1.0,
    ) -> WindowPass:
        """A pass over `[first, stop)` that differentiates `[start, stop)`."""
        window, records, options = self._window, self._records, self._options
        ambients = records.ambients_for(first, options.k1)
        joints = self._joints() if start < stop else {}
        stops = {start, *self._stops(ambients), *joints}
        return WindowPass(
            blocks=self._blocks,
            first=first,
            start=start,
            stop=stop,
            loss_start=self._loss_start if start < stop else stop,
            ambient=self._ambient,
            runner=runner,
            loss=loss,
            guard=guard,
            grad_scale=grad_scale,
            stops_at=sorted(s for s in stops if first < s < window.stop),
            ambients=ambients,
            joints=joints,
            resets=self._resets,
            wants_state_grads=self._wants_state_grads,
            observer=self._observer,
            note=self.notes.arrives,
            new_start=window.new_start,
            calls=self._records.calls,
            checks_replays=self._parts.checks_replays,
            has_room=options.memory_budget is None,
            completed=lambda: self.numbers.complete(loss, self.notes.states()),
            numbers=self.numbers,
            borders=self.borders,
        )

    def _stops(self, ambients: dict[int, AmbientState], noted: Sequence[int] = ()) -> set[int]:
        """Where every run ends, whatever the plan, once some states have been `noted`."""
        changes = self._ambient.changes(ambients)
        return {self._window.new_start, *self.draw.borders, *self.notes.stops(noted), *changes}

    def _cuts(self) -> list[int]:
        """Of these, where a leaf may go on; calls of steps are none of a segment."""
        window, stop, runner = self._reached, self._reached.stop, self._parts.runner
        block = runner.block_steps  # at whose ends a cut costs nothing
        if not (runner.calls_segments or runner.compiled.may_be_taken()):
            return []
        found = self._records.ambients_for(window.first, self._options.k1)
        noted = self.draw.later if self.draw.audited else ()  # before its leaves run
        inner = self._stops(found, noted) - {*self._joint_steps()}
        return [s for s in inner if window.start < s < stop and (block == 1 or (stop - s) % block)]

    def _advance(
        self, boundary: Boundary, stop: int, guard: WeightGuard, longest: int = ADVANCE_STEPS
    ) -> None:
        this_pass = self._pass(boundary.step, stop, stop, guard, self._parts.runner)
        with SilenceableHooks():
            this_pass.advance(boundary, stop, longest)
        self.executed_steps += this_pass.executed_steps

    def _probe(self) -> SegmentProbe:
        parts, window = self._parts, self._reached
        return SegmentProbe(
            runner=parts.runner,
            loss=parts.loss_function,
            blocks=self._blocks,
            ambient=self._ambient,
            parameters=parts.updater.deliveries.wholes(parts.parameters),
            device=parts.device,
            first=window.first,
            stop=window.stop,
            loss_start=self._loss_start,
            boundary=self._boundary_at(window.first),
            resets=self._resets,
            checks_replays=parts.checks_replays,
        )

    def _joint_steps(self) -> Sequence[int]:
        """Where blocks restart: at recorded states, and in an audit at those of today."""
        is_stale, k1 = self._options.is_stale, self._options.k1
        return joint_steps(self._reached, k1) if is_stale else self.draw.audited

    def _joints(self) -> dict[int, Boundary]:
        return {step: self.notes.noted(step) for step in self._joint_steps()}

    def _boundary_at(self, step: int) -> Boundary:
        records = self._records
        if step == records.origin:
            state = records.origin_state if records.has_origin_state else self._initial.state
            return Boundary(step, state, records.ambients[step])
        return records.boundaries[step]
