"""One pass over a sequence: what each window starts from, notes, and hands on."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tbptt_ckpt.budget.meter import UnmeteredWindow, WindowMeter
from tbptt_ckpt.budget.planned_window import PlannedWindow
from tbptt_ckpt.data.blocks import StepBlock
from tbptt_ckpt.data.window_reader import WindowReader
from tbptt_ckpt.engine.initial_state import InitialState
from tbptt_ckpt.engine.parts import Settings
from tbptt_ckpt.engine.passage import Passage
from tbptt_ckpt.engine.records import Records, load_records, store_records
from tbptt_ckpt.engine.results import Outcome, Totals, TrainResult, WindowResult
from tbptt_ckpt.errors import ArgumentError, InfeasibleBudgetError
from tbptt_ckpt.executor.task import has_loss
from tbptt_ckpt.executor.window_run import StateGrads, WeightGuard
from tbptt_ckpt.module.ambient import Ambient, AmbientState
from tbptt_ckpt.module.recurrence import device_of
from tbptt_ckpt.module.trees import Tree, tensors_of
from tbptt_ckpt.schedule.windows import Window, update_point, window_at
from tbptt_ckpt.updates.updater import UpdaterMark


class SequenceRun:
    """Runs the windows of one sequence in order.

    Args:
        settings: What the user asked for.
        sequence: The steps.
        init_state: The state at step 0.
    """

    def __init__(self, settings: Settings, sequence: object, init_state: Tree) -> None:
        if torch.is_inference_mode_enabled():
            raise ArgumentError(
                "a gradient was asked for under torch.inference_mode, which records none; call "
                "this outside of it"
            )
        self.settings = settings
        self.reader = WindowReader(sequence, settings.k1, settings.k2)
        self.has_length = self.reader.num_steps is not None
        self.initial = InitialState(init_state, settings.updater, settings.recurrence.lane_dim)
        self.records = Records()
        self.totals = Totals()
        self.state_grads: StateGrads | None = None
        settings.updater.group.begin()
        self._weights_before: object = None
        self._ambient: Ambient | None = None
        self._begun = time.perf_counter()
        self._present: AmbientState | None = None  # to start from, once devices are known
        self._first_ambient: AmbientState | None = None
        self.index = 0
        self.inspect: Inspect | None = None
        self.on_plan: Callable[[], None] = do_nothing

    def __iter__(self) -> Iterator[WindowResult]:
        while (window := self.next_window()) is not None:
            yield self.run_window(window)
        self.finish()

    def finish(self) -> None:
        """Every window has run: differentiate what the first state was computed from.

        Where the last window was skipped, the group of windows before it updates here.
        """
        if self._ambient is not None:
            self._ambient.check_complete(searches=True)
        if self.totals.num_steps == self.reader.num_steps:
            self.settings.updater.update(True, self.initial.leaves())
        self.initial.backward()

    def result(self) -> TrainResult:
        """What all windows gave together, once they have run."""
        assert self.records.carried is not None, "every sequence has a window"
        seconds = time.perf_counter() - self._begun
        return self.totals.result(self.records.carried, seconds)

    def next_window(self) -> Window | None:
        """The next window, or None at the end; reads up to k1 steps past its end."""
        k1, k2, index = self.settings.k1, self.settings.k2, self.index
        self.reader.look_ahead(update_point(index + 1, None, k1))
        num_steps = self.reader.num_steps
        if num_steps is not None and index * k1 >= num_steps:
            return None
        self.reader.drop_before(window_at(index, num_steps, k1, k2).first)
        self.reader.look_ahead(update_point(index + 2, None, k1))
        window = window_at(index, self.reader.num_steps, k1, k2)
        return self._from_recorded_start(self._from_origin(window))

    def _from_origin(self, window: Window) -> Window:
        """No window reaches back across windows that were skipped."""
        start = max(window.start, self.records.origin)
        return Window(window.index, start, window.new_start, window.stop)

    def _from_recorded_start(self, window: Window) -> Window:
        """Under stale overlap a last window of unforeseen length starts at a recorded state."""
        foreseen = window.start in (self.records.origin, window.new_start)
        foreseen = foreseen or window.start > window.new_start
        if foreseen or self.has_length or self.settings.overlap == "refresh":
            return window
        start = self.records.first_at_or_after(window.start)
        return Window(window.index, start, window.new_start, window.stop)

    def _begin(self, window: Window) -> tuple[Sequence[StepBlock], Passage, PlannedWindow | None]:
        """The window's steps, its passage, and its plan; None where it has no loss."""
        blocks = self.reader.window(window.first, window.stop)
        passage = Passage(
            self.settings,
            window,
            self.reader.num_steps,
            blocks,
            self._ambient_for(blocks),
            self.initial,
            self.records,
        )
        loss_start = self._loss_start(window)
        if not has_loss(blocks, loss_start, window.stop):
            return blocks, passage, None
        planned = self.settings.plans.plan(
            window, passage.joints(), lambda: passage.request(loss_start, self._held())
        )
        self.on_plan()
        return blocks, passage, planned

    def _loss_start(self, window: Window) -> int:
        return window.new_start if self.settings.loss == "new" else window.stop - 1

    def run_window(self, window: Window) -> WindowResult:
        """Run the next window and update the weights."""
        begun = time.perf_counter()
        loss_start = self._loss_start(window)
        guard = WeightGuard(self.settings.weights())
        blocks, passage, planned = self._begin(window)
        num_tokens = passage.num_tokens()
        self.settings.updater.clear(self.initial.leaves())
        with self._meter(planned, blocks) as meter:
            try:
                if planned is not None:
                    scale = self._grad_scale()
                    outcome = passage.differentiate(loss_start, guard, scale, planned, meter)
                else:
                    outcome = passage.only_advance(guard, self._weights_before)
            except InfeasibleBudgetError:  # found out in the middle: half a gradient is none
                self.settings.updater.clear(self.initial.leaves())
                raise
            finally:
                passage.restore_ambient()
            if self.inspect is not None:
                self.inspect(window, outcome.loss, passage.states())
            self._weights_before = guard.expected
            passage.hand_on(ran_again=outcome.executed_steps > window.num_new_steps)
            self.state_grads = outcome.state_grads
            updated = self._update(window, outcome)
            lap, peak_bytes = meter.lap(), meter.peak_bytes
        if planned is not None and lap is not None and peak_bytes is not None:
            self.settings.plans.learn(planned, lap, peak_bytes)
        self.totals.add(window, outcome, num_tokens)
        self.totals.add_peak(peak_bytes)
        self.index += 1
        return WindowResult(
            index=window.index,
            start=window.start,
            new_start=window.new_start,
            stop=window.stop,
            loss=outcome.loss,
            state=passage.final.state,
            recomputed_steps=outcome.executed_steps - window.num_new_steps,
            peak_bytes=peak_bytes,
            drift=passage.drift,
            seconds=time.perf_counter() - begun,
            plan=outcome.plan,
            updated=updated,
        )

    def _grad_scale(self) -> float:
        updater = self.settings.updater
        return 1.0 if updater.scaler is None else updater.grad_scale(self.settings.device_type)

    def _update(self, window: Window, outcome: Outcome) -> bool:
        updater = self.settings.updater
        if outcome.loss is not None:
            if window.start == self.records.origin and not self.records.has_origin_state:
                self.initial.collect(outcome.state_grads)
            updater.add(outcome.loss)
        return updater.update(window.stop == self.reader.num_steps, self.initial.leaves())

    def _held(self) -> tuple[object, ...]:
        """What is live between windows and belongs to the run: inputs and states aside."""
        settings, records = self.settings, self.records
        return (
            settings.parameters,
            settings.recurrence.module,
            settings.loss_function.loss_fn,
            settings.updater.optimizer,
            self.initial.state,
            list(records.ambients.values()),
        )

    def _meter(
        self, planned: PlannedWindow | None, blocks: Sequence[StepBlock]
    ) -> WindowMeter | UnmeteredWindow:
        if not self.settings.measure_memory and not (planned and planned.metered):
            return UnmeteredWindow()
        input_bytes = sum(block.num_bytes() for block in blocks)
        held = (*self._held(), *self.records.boundaries.values())
        return WindowMeter(device_of(self.settings.parameters), held, input_bytes)

    def _ambient_for(self, blocks: Sequence[StepBlock]) -> Ambient:
        if self._ambient is None:
            tensors = [*self.settings.parameters, *tensors_of(self.initial.state)]
            tensors += tensors_of(blocks[0].inputs)
            self._ambient = Ambient([self.settings.recurrence.module], tensors)
            if self._present is not None:
                self._ambient.adopt(self._present)
            self._first_ambient = self._ambient.capture()
        return self._ambient

    def mark(self) -> Mark:
        """Where the run stands between windows, for `rewind`; holds states, copies none.

        Where gradients accumulate they are copied, since a window adds to them.
        """
        ambient = self._present_ambient()
        return Mark(
            index=self.index,
            records=self.records.copy(),
            totals=copy.copy(self.totals),
            ambient=ambient,
            random=torch.get_rng_state() if ambient is None else None,
            weights_before=self._weights_before,
            state_grads=self.state_grads,
            updater=self.settings.updater.mark(self.initial.leaves()),
            collected=self.initial.collected(),
        )

    def rewind(self, mark: Mark) -> None:
        """Undo a window that was cut short: everything is as it was at `mark`.

        Raises:
            TbpttError: Some weights were updated already, and no copy was taken.
        """
        settings = self.settings
        settings.updater.rewind(mark.updater, self.initial.leaves(), settings.device_type)
        self.index, self.records = mark.index, mark.records.copy()
        self.totals, self.state_grads = copy.copy(mark.totals), mark.state_grads
        self._weights_before = mark.weights_before
        self.initial.set_collected(mark.collected)
        ambient = mark.ambient or self._first_ambient
        if self._ambient is not None and ambient is not None:
            self._ambient.restore(ambient)
        if mark.random is not None:
            torch.set_rng_state(mark.random)

    def skip(self, window: Window) -> None:
        """Go on after `window`, which is next, from the state before it and without an update."""
        ambient = self._ambient_for(self.reader.window(window.first, window.stop)).capture()
        self.records.restart_at(window.stop, ambient)
        self.index += 1
        self.totals.num_steps, self.totals.num_windows = window.stop, self.index

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands between windows, in containers of numbers and tensors.

        The tensors are the run's own; write them out before the next window.
        """
        present = self._present_ambient()
        stored = None if present is None else store_records(self.records, present)
        before = self._weights_before
        changed = before is not None and before != self._weights()
        return {
            "index": self.index,
            "records": stored,
            "totals": vars(self.totals).copy(),
            "weights": "unknown" if before is None else "changed" if changed else "unchanged",
            "collected": self.initial.collected(),
            "group": self.settings.updater.group.state_dict(),
            "returns_pairs": self.settings.loss_function.returns_pairs,
            "reader": self.reader.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was called, in a run that has not begun.

        The global generators, weights and buffers that are not part of a boundary state are
        the caller's to restore.
        """
        assert self._ambient is None, "the run has not begun"
        self.reader.load_state_dict(state["reader"])
        self.index = state["index"]
        vars(self.totals).update(state["totals"])
        self.initial.set_collected(state["collected"])
        self.settings.updater.group.load_state_dict(state["group"])
        self.settings.loss_function.returns_pairs = state["returns_pairs"]
        if state["records"] is not None:
            self.records, self._present = load_records(state["records"])
        known = {"unknown": None, "changed": "changed", "unchanged": self._weights()}
        self._weights_before = known[state["weights"]]

    def _present_ambient(self) -> AmbientState | None:
        """Generators and buffers now; None before devices are known."""
        if self._ambient is None:
            return self._present
        self._ambient.about_to_run()  # whoever got the last window may have run the module
        return self._ambient.capture()

    def _weights(self) -> object:
        return WeightGuard(self.settings.weights()).fingerprint()


def do_nothing() -> None:
    """A window is planned; `SequenceRun.on_plan` is called before anything of it has run."""


# Called before a window's update with its loss and the states later windows start from.
Inspect = Callable[[Window, Tensor | None, list[Tree]], None]


@dataclass(frozen=True, slots=True, eq=False)
class Mark:
    """Where a run stood between two windows."""

    index: int
    records: Records
    totals: Totals
    ambient: AmbientState | None
    random: Tensor | None
    weights_before: object
    state_grads: StateGrads | None
    updater: UpdaterMark
    collected: dict[int, Tensor]
