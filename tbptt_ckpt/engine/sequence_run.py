"""One run over a sequence, window by window: what each starts from and hands on."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from tbptt_ckpt.budget.meter import UnmeteredWindow, WindowMeter
from tbptt_ckpt.budget.window_budget import PlannedWindow
from tbptt_ckpt.data.window_reader import WindowReader
from tbptt_ckpt.engine.agreement import Agreement
from tbptt_ckpt.engine.compiling import compile_planned, plan_opened
from tbptt_ckpt.engine.initial_state import InitialState
from tbptt_ckpt.engine.open_window import OpenWindow
from tbptt_ckpt.engine.options import Options
from tbptt_ckpt.engine.parts import Parts
from tbptt_ckpt.engine.results import Totals, TrainResult, WindowResult
from tbptt_ckpt.engine.run_ambient import RunAmbient
from tbptt_ckpt.engine.standing import Mark, Standing, load_standing
from tbptt_ckpt.errors import ArgumentError, TbpttError
from tbptt_ckpt.executor.guard import WeightGuard
from tbptt_ckpt.executor.observer import UNOBSERVED, Observer, together
from tbptt_ckpt.executor.window_pass import StateGrads
from tbptt_ckpt.module.trees import Tree
from tbptt_ckpt.schedule.truncation import Draw
from tbptt_ckpt.schedule.windows import Window, update_point, window_at


class SequenceRun:
    """Runs the windows of one sequence in order; `observer` is told after the parts' own one."""

    def __init__(
        self,
        options: Options,
        parts: Parts,
        sequence: object,
        init_state: Tree,
        observer: Observer = UNOBSERVED,
    ) -> None:
        if torch.is_inference_mode_enabled():
            raise ArgumentError(
                "a gradient was asked for under torch.inference_mode, which records none; call "
                "this outside of it"
            )
        self._options, self._parts = options, parts
        self._observer = together(parts.observer, observer, *parts.gauges)
        device = None if options.memory_budget is None else parts.device
        self._reader = WindowReader(sequence, options.k1, options.most_k2, parts.recurrence, device)
        self._has_length = self._reader.num_steps is not None
        self.initial = InitialState(init_state, parts.updater, parts.recurrence.lane_dim)
        self.agreement = Agreement(parts, self._observer, self.initial)
        self._standing = Standing()
        parts.updater.begin_sequence()
        self._ambient = RunAmbient(parts, self.initial)
        self._begun = time.perf_counter()

    @property
    def totals(self) -> Totals:
        """Sums over the windows so far."""
        return self._standing.totals

    @property
    def num_steps(self) -> int:
        """Steps trained so far, of the rank that has come furthest."""
        return max(self.totals.num_steps, self.agreement.reached)

    @property
    def state_grads(self) -> StateGrads | None:
        """Gradients of the last window's first state."""
        return self._standing.state_grads

    def __iter__(self) -> Iterator[WindowResult]:
        while (window := self.next_window()) is not None:
            result = self.run_window(window)
            if window.num_new_steps:  # one of other ranks has none here
                yield result
        self.finish()

    def finish(self) -> None:
        """Every window has run: differentiate what the first state was computed from.

        Where the last window was skipped, the group of windows before it updates here.
        """
        self._ambient.check_complete()
        is_over = self.totals.num_steps == self._reader.num_steps
        if is_over and not self.agreement.takes_part:
            self.agreement.finish(self.totals.peak_bytes)
            self._parts.updater.update(True, self.initial.leaves(), self._observer)
        self.initial.backward()

    def result(self) -> TrainResult:
        """What all windows gave together, once they have run."""
        last, seconds = self._standing.records.carried, time.perf_counter() - self._begun
        assert last is not None, "every sequence has a window"
        return self.totals.result(last.state, seconds, self.agreement.peaks)

    def has_ended(self) -> bool:
        """Whether this sequence has no further window; reads up to k1 steps past the last one."""
        k1, index = self._options.k1, self._standing.index
        self._reader.look_ahead(update_point(index + 1, None, k1))
        num_steps = self._reader.num_steps
        return num_steps is not None and index * k1 >= num_steps

    def next_window(self) -> Window | None:
        """The next window, or None at the end; reads up to k1 steps past its end.

        One without steps is run by other ranks, whose sequences have not ended.
        """
        k1, k2, index = self._options.k1, self._options.most_k2, self._standing.index
        has_ended, num_steps = self.has_ended(), self._reader.num_steps
        if has_ended and num_steps is not None:
            is_theirs = self.agreement.takes_part
            return Window(index, num_steps, num_steps, num_steps) if is_theirs else None
        self._reader.drop_before(window_at(index, num_steps, k1, k2).first)
        self._reader.look_ahead(update_point(index + 2, None, k1))
        window = window_at(index, self._reader.num_steps, k1, k2)
        must_be_recorded = self._options.begins_at_records(has_length=self._has_length)
        return self._standing.records.placed(window, must_be_recorded=must_be_recorded)

    def run_window(self, window: Window) -> WindowResult:
        """Run the next window and update the weights."""
        try:
            run = self._run if window.num_new_steps else self.agreement.take_part
            result, self._standing = run(window, self._standing)
        except StopIteration as error:  # it would be taken for the end of the windows
            raise TbpttError(
                "module, loss_fn, a hook or the optimizer raised StopIteration; raise another error"
            ) from error
        return result

    def _run(self, whole: Window, before: Standing) -> tuple[WindowResult, Standing]:
        begun, parts = time.perf_counter(), self._parts
        parts.updater.deliveries.begin()
        guard = parts.guard(weights := parts.weights())
        opened = self._open(parts.truncation.of(whole))
        window, records = opened.draw.window, before.records
        waiting = (*weights, *self.initial.leaves())
        planned = self._plan(opened, waiting)
        parts.updater.clear(self.initial.leaves())
        put_back = parts.updater.set_aside(self.initial.leaves(), keeps=parts.checks_replays)
        compile_planned(parts, opened, planned, waiting)
        compile_seconds = parts.runner.compiled.take_seconds()
        delivery = parts.updater.deliveries.of(waiting)
        with self._meter(planned, opened) as meter, delivery:
            state_grads = self._differentiate(opened, planned, guard, meter, put_back)
            meter.lap()  # what checks took, some of them once, is none of the update's
            agreed = self.agreement.after(opened, window, self._reader.num_steps)
            opened.hand_on()
            if (loss := opened.numbers.loss) is not None:
                if window.start == records.origin and not records.has_origin_state:
                    self.initial.collect(state_grads)
                delivery.deliver(agreed.factor)
            if agreed.loss is not None:
                parts.updater.add(agreed.loss, agreed.number)
            updated = parts.updater.update(agreed.is_last, self.initial.leaves(), self._observer)
            lap, peak_bytes = meter.lap(), meter.peak_bytes
        if planned is not None and lap is not None and peak_bytes is not None:
            parts.budget.learn(planned, lap, peak_bytes, meter.reserved_peak_bytes)
        figures = self.agreement.learned(opened, agreed)
        result = WindowResult(
            **asdict(window),
            state=opened.notes.final.state,
            recomputed_steps=opened.executed_steps - window.num_new_steps,
            peak_bytes=peak_bytes,
            reserved_peak_bytes=meter.reserved_peak_bytes,
            drift=opened.notes.drift.value,
            seconds=time.perf_counter() - begun - compile_seconds,
            compile_seconds=compile_seconds,
            plan=parts.plan_of(planned) if planned is not None and loss is not None else None,
            updated=updated,
            **parts.reach.take_figures(),
            **figures,
            **agreed.figures(opened),
        )
        totals = before.totals.plus(result, *agreed.sums(opened.loss))
        return result, Standing(window.index + 1, records, totals, guard.expected, state_grads)

    def _open(self, draw: Draw) -> OpenWindow:
        """The window with its steps; what generators and buffers they find is recorded."""
        blocks = self._reader.window(draw.window.first, draw.window.stop, draw.whole.first)
        ambient = self._ambient.of(blocks)
        records, num_steps = self._standing.records, self._reader.num_steps
        records.find_ambient(draw.window.new_start, ambient.found())
        given = (self._options, self._parts, draw, num_steps, blocks, ambient)
        return OpenWindow(*given, self.initial, records, self._observer)

    def _plan(self, opened: OpenWindow, waiting: Sequence[Tensor]) -> PlannedWindow | None:
        copies = self._observer.wants_copies
        given = (self._parts, opened, self._reader, self._held, waiting)
        planned = plan_opened(*given, copies_weights=copies)
        if planned is not None:
            self._observer.planned(opened.draw.window)
        return planned

    def _differentiate(
        self,
        opened: OpenWindow,
        planned: PlannedWindow | None,
        guard: WeightGuard,
        meter: WindowMeter | UnmeteredWindow,
        put_back: Callable[[], None],
    ) -> StateGrads | None:
        """Run a window, with its gradient where it has a plan."""
        try:
            if planned is None:
                opened.only_advance(guard, self._standing.weights_before)
                return None
            scale = self._parts.updater.grad_scale(self._parts.device)
            return opened.differentiate(guard, scale, planned, meter, put_back)
        except TbpttError:  # half a gradient is none
            put_back()
            opened.notes.forget()
            raise
        finally:
            opened.restore_ambient()

    def _held(self) -> tuple[object, ...]:
        """What is live between windows and belongs to the run: inputs and states aside."""
        ambients = list(self._standing.records.ambients.values())
        return (*self._parts.held(), self.initial.state, ambients)

    def _meter(
        self, planned: PlannedWindow | None, opened: OpenWindow
    ) -> WindowMeter | UnmeteredWindow:
        wanted = self._options.measure_memory or (planned and planned.metered)
        if not wanted or not self._parts.budget.can_meter(self._parts.device):
            return UnmeteredWindow()
        held = (*self._held(), *self._standing.records.boundaries.values())
        beside = opened.beside_bytes(self._reader) + self._parts.updater.aside_bytes
        return WindowMeter(self._parts.device, held, beside)

    def mark(self) -> Mark:
        """Where the run stands, for `rewind`; copies no states, but gradients that accumulate."""
        return Mark(
            standing=self._standing.copy(),
            rewind_ambient=self._ambient.mark(),
            rewind_updater=self._parts.updater.mark(self.initial.leaves(), self._parts.device),
            collected=self.initial.collected(),
        )

    def rewind(self, mark: Mark) -> None:
        """Undo a window that was cut short: everything is as it was at `mark`.

        Raises:
            TbpttError: Some weights were updated already, and no copy was taken.
        """
        mark.rewind_updater()
        self._standing = mark.standing.copy()
        self.initial.set_collected(mark.collected)
        mark.rewind_ambient()

    def skip(self, window: Window) -> None:
        """Go on after `window`, which is next, from the state before it and without an update."""
        if not window.num_new_steps:
            self._standing = replace(self._standing, index=window.index + 1)
            return
        ambient = self._ambient.of(self._reader.window(window.first, window.stop)).found()
        self._standing = self._standing.skipping(window, ambient)

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands between windows; tensors are its own, to be written at once."""
        return {
            **self._standing.state_dict(self._ambient.present(), self._weights()),
            "collected": self.initial.collected(),
            "group": self._parts.updater.group.state_dict(),
            "returns_pairs": self._parts.loss_function.state_dict(),
            "reader": self._reader.state_dict(),
            "reached": self.agreement.reached,
        }

    def load_state_dict(self, state: dict[str, Any], changed: Container[str] = ()) -> None:
        """Go on where `state_dict` was called, in a run that has not begun.

        The global generators, weights and buffers that are not part of a boundary state are
        the caller's to restore. What has `changed`, by name, goes on as it is.
        """
        self._reader.load_state_dict(state["reader"], changed="data" in changed)
        self.initial.set_collected(state["collected"])
        self.agreement.go_on(state.get("reached", 0))  # older ones do not say
        self._parts.updater.group.load_state_dict(state["group"])
        if "loss_fn" not in changed:
            self._parts.loss_function.load_state_dict(state["returns_pairs"])
        self._standing, found = load_standing(state, self._weights())
        self._ambient.go_on(found)

    def unkept_window(self, limit: int | None, *, changed: bool = True) -> Window | None:
        """The first one without its first state, up to `limit`; that or the data has `changed`."""
        if self.totals.num_steps % self._options.k1:
            self._reader.look_ahead(self.totals.num_steps + 1)
        ends = filter(None, (self._reader.num_steps, limit))
        at_records = self._options.begins_at_records(has_length=changed or self._has_length)
        return self._standing.unkept_window(min(ends, default=None), self._options, at_records)

    def _weights(self) -> object:
        return self._parts.guard(self._parts.weights()).fingerprint()
