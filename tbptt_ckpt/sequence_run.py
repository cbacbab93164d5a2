"""One pass over a sequence: what each window starts from, notes, and hands on."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch

from tbptt_ckpt.ambient import Ambient
from tbptt_ckpt.blocks import StepBlock
from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.executor import StateGrads, WeightGuard
from tbptt_ckpt.initial_state import InitialState
from tbptt_ckpt.passage import Outcome, Passage
from tbptt_ckpt.reading import WindowReader
from tbptt_ckpt.records import Records
from tbptt_ckpt.results import TrainResult, WindowResult
from tbptt_ckpt.settings import Settings
from tbptt_ckpt.state import Tree, tensors_of
from tbptt_ckpt.task import Boundary, has_loss
from tbptt_ckpt.windows import Window, update_point, window_at


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
        self.initial = InitialState(init_state, settings.updater)
        self.records = Records()
        self.totals = Totals()
        self.state_grads: StateGrads | None = None
        self._weights_before: object = None
        self._ambient: Ambient | None = None
        self._begun = time.perf_counter()

    def __iter__(self) -> Iterator[WindowResult]:
        index = 0
        while (window := self._next_window(index)) is not None:
            yield self._run_window(window)
            index += 1
        self.initial.backward()

    def result(self) -> TrainResult:
        """What all windows gave together, once they have run."""
        assert self.records.carried is not None, "every sequence has a window"
        seconds = time.perf_counter() - self._begun
        return self.totals.result(self.records.carried, seconds)

    def _next_window(self, index: int) -> Window | None:
        """The next window, or None at the end; reads up to k1 steps past its end."""
        k1, k2 = self.settings.k1, self.settings.k2
        self.reader.look_ahead(update_point(index + 1, None, k1))
        num_steps = self.reader.num_steps
        if num_steps is not None and index * k1 >= num_steps:
            return None
        self.reader.drop_before(window_at(index, num_steps, k1, k2).first)
        self.reader.look_ahead(update_point(index + 2, None, k1))
        window = window_at(index, self.reader.num_steps, k1, k2)
        return self._from_recorded_start(window)

    def _from_recorded_start(self, window: Window) -> Window:
        """Under stale overlap a last window of unforeseen length starts at a recorded state."""
        foreseen = window.start in (0, window.new_start) or window.start > window.new_start
        if foreseen or self.has_length or self.settings.overlap == "refresh":
            return window
        start = self.records.first_at_or_after(window.start)
        return Window(window.index, start, window.new_start, window.stop)

    def _run_window(self, window: Window) -> WindowResult:
        begun = time.perf_counter()
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
        loss_start = window.new_start if self.settings.loss == "new" else window.stop - 1
        guard = WeightGuard(self.settings.weights())
        self.settings.updater.clear(self.initial.leaves())
        try:
            if has_loss(blocks, loss_start, window.stop):
                scale = self.settings.updater.grad_scale(self.settings.device_type)
                outcome = passage.differentiate(loss_start, guard, scale)
            else:
                outcome = passage.only_advance(guard, self._weights_before)
        finally:
            passage.restore_ambient()
        self._weights_before = guard.fingerprint()
        passage.hand_on()
        self.state_grads = outcome.state_grads
        updated = outcome.loss is not None and self._update(window, outcome)
        self.totals.add(window, outcome, passage.num_tokens())
        return WindowResult(
            index=window.index,
            start=window.start,
            new_start=window.new_start,
            stop=window.stop,
            loss=outcome.loss,
            state=passage.final.state,
            recomputed_steps=outcome.executed_steps - window.num_new_steps,
            peak_bytes=None,
            drift=passage.drift,
            seconds=time.perf_counter() - begun,
            plan=outcome.plan,
            updated=updated,
        )

    def _update(self, window: Window, outcome: Outcome) -> bool:
        assert outcome.loss is not None, "a window without a loss makes no update"
        if window.start == 0:
            self.initial.collect(outcome.state_grads)
        self.settings.updater.unscale_others(outcome.grad_scale, self.initial.leaves())
        return self.settings.updater.step(outcome.loss)

    def _ambient_for(self, blocks: Sequence[StepBlock]) -> Ambient:
        if self._ambient is None:
            tensors = [*self.settings.parameters, *tensors_of(self.initial.state)]
            tensors += tensors_of(blocks[0].inputs)
            self._ambient = Ambient([self.settings.recurrence.module], tensors)
        return self._ambient


class Totals:
    """Sums over the windows of a run."""

    def __init__(self) -> None:
        self.loss_sum, self.weight = 0.0, 0.0
        self.num_steps, self.num_windows, self.num_tokens = 0, 0, 0

    def add(self, window: Window, outcome: Outcome, num_tokens: int) -> None:
        """Add a window."""
        self.loss_sum += outcome.loss_sum
        self.weight += outcome.weight
        self.num_steps, self.num_windows = window.stop, window.index + 1
        self.num_tokens += num_tokens

    def result(self, final: Boundary, seconds: float) -> TrainResult:
        """The run's result."""
        return TrainResult(
            loss=self.loss_sum / self.weight if self.weight else None,
            state=final.state,
            num_steps=self.num_steps,
            num_windows=self.num_windows,
            peak_bytes=None,
            seconds=seconds,
            tokens_per_second=self.num_tokens / seconds,
        )
