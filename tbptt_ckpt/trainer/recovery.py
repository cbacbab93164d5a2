"""Runs one window so that a fault leaves either what was before it or what comes after."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

import torch
from torch import Tensor

from tbptt_ckpt.engine.parts import Settings
from tbptt_ckpt.engine.results import WindowResult
from tbptt_ckpt.engine.sequence_run import Mark, SequenceRun
from tbptt_ckpt.errors import NonFiniteError, OutOfMemoryError
from tbptt_ckpt.memory.available import free_memory
from tbptt_ckpt.memory.exhausted import is_out_of_memory, release_memory
from tbptt_ckpt.memory.resident import rss_bytes
from tbptt_ckpt.memory.sizes import format_bytes
from tbptt_ckpt.module.trees import Tree, is_differentiable, iterate_tensors
from tbptt_ckpt.schedule.plan import plan_window
from tbptt_ckpt.schedule.strategies import Revolve, Strategy, Uniform
from tbptt_ckpt.schedule.windows import Window
from tbptt_ckpt.trainer.announcer import Announcer
from tbptt_ckpt.trainer.options import NonFinite, OutOfMemory

# Below a quarter of the square root of the window, uniform leaves need more for their first
# states than they save; several levels of few states take over.
_FEW_STATES = (16, 4, 1)


class Recovery:
    """Runs windows under the policies for non-finite numbers and missing memory.

    Args:
        settings: Of the engine; its strategy is replaced when a smaller one is needed.
        non_finite: What to do about NaN and infinity.
        out_of_memory: What to do about missing memory.
        announcer: Told of every fault.
    """

    def __init__(
        self,
        settings: Settings,
        non_finite: NonFinite,
        out_of_memory: OutOfMemory,
        announcer: Announcer,
    ) -> None:
        self._settings, self._announcer = settings, announcer
        self._non_finite, self._out_of_memory = non_finite, out_of_memory
        self._skipped_in_a_row = 0
        self._window: Window | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Have the engine measure gradients, and copy what an update changes."""
        updater = self._settings.updater
        before = updater.watch_norm, updater.watches_updates, updater.protects_updates
        updater.watch_norm, updater.watches_updates = self._check_norm, True
        updater.protects_updates = self._out_of_memory.protect_update
        try:
            yield
        finally:
            updater.watch_norm, updater.watches_updates, updater.protects_updates = before

    def next_window(self, run: SequenceRun) -> Window | None:
        """The run's next window; reading it is tried again where memory is missing."""
        for attempt in count(1):
            try:
                return run.next_window()
            except Exception as error:
                if not is_out_of_memory(error) or attempt > self._out_of_memory.retries:
                    raise
                failure = _first_line(error)
            self._note_exhausted(f"reading failed ({failure}); reading again", attempt)
        raise AssertionError("count does not end")

    def run(self, run: SequenceRun, window: Window) -> WindowResult | None:
        """Run the next window of `run`; None where it was skipped.

        Raises:
            NonFiniteError: The policy is to stop; everything is as it was before the window.
            OutOfMemoryError: No plan that was tried fits, with the figures.
        """
        self._window, run.inspect = window, self._inspect
        for attempt in count(1):
            mark: Mark | None = None
            problem = failure = None
            try:
                mark = run.mark()
                result = run.run_window(window)
            except NonFiniteError as error:
                problem = str(error)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failure = _first_line(error)
            else:
                self._skipped_in_a_row = 0
                return result
            # Here, outside of the except block, the failed call's tensors are free.
            release_memory()
            if mark is not None:
                run.rewind(mark)
                mark = None
            if problem is not None:
                self._skip_or_stop(run, window, problem)
                return None
            self._shrink_or_stop(window, attempt, str(failure))
        raise AssertionError("count does not end")

    def _inspect(self, window: Window, loss: Tensor | None, states: list[Tree]) -> None:
        if loss is not None and not bool(torch.isfinite(loss)):
            self._found(f"the loss is {float(loss)}")
        for state in states:
            for tensor in iterate_tensors(state):
                if is_differentiable(tensor) and not bool(torch.isfinite(tensor).all()):
                    self._found(f"the state, {tuple(tensor.shape)}, holds NaN or infinity")
                    return

    def _check_norm(self, norm: Tensor) -> None:
        if self._settings.updater.scaler is None and not bool(torch.isfinite(norm)):
            self._found(f"the norm of the gradients is {float(norm)}")

    def _found(self, problem: str) -> None:
        window = self._window
        assert window is not None, "a window is running"
        where = f"window {window.index}, steps {window.new_start} to {window.stop}: {problem}"
        if self._non_finite.policy != "go on":
            raise NonFiniteError(where)
        self._announcer.notice("non_finite", f"{where}; going on", window=window.index)

    def _skip_or_stop(self, run: SequenceRun, window: Window, problem: str) -> None:
        if self._non_finite.policy == "stop":
            raise NonFiniteError(
                f"{problem}; nothing was updated. A lower learning rate or clip_grad_norm may "
                "help, NonFinite(policy='skip') leaves such windows out"
            )
        self._skipped_in_a_row += 1
        most = self._non_finite.most_in_a_row
        if self._skipped_in_a_row > most:
            raise NonFiniteError(f"{problem}; {most} windows before it were skipped already")
        run.skip(window)
        self._announcer.notice("non_finite", f"{problem}; skipped", window=window.index)

    def _shrink_or_stop(self, window: Window, attempt: int, failure: str) -> None:
        settings = self._settings
        used = settings.strategy
        smaller = smaller_strategy(used, window)
        if smaller is None or attempt > self._out_of_memory.retries:
            raise OutOfMemoryError(
                f"window {window.index}, steps {window.start} to {window.stop}, does not fit into "
                f"memory under strategy {used} either, after {attempt} tries: {failure} "
                f"({self._memory_in_words()}). A smaller model, fewer lanes or a smaller k2 take "
                "less"
            )
        settings.strategy = smaller
        self._note_exhausted(
            f"window {window.index} did not fit under strategy {used} ({failure}); running it "
            f"again under {smaller}, from here on equal to other runs to rounding",
            attempt,
        )

    def _note_exhausted(self, message: str, attempt: int) -> None:
        resident = rss_bytes().total
        self._announcer.notice("out_of_memory", message, attempt=attempt, rss_bytes=resident)

    def _memory_in_words(self) -> str:
        device = torch.device(self._settings.device_type)
        return (
            f"{format_bytes(free_memory(device))} free on {device}, "
            f"{format_bytes(rss_bytes().total)} resident"
        )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def smaller_strategy(strategy: Strategy, window: Window) -> Strategy | None:
    """The next strategy to try, or None where `strategy` takes the least there is.

    Leaves are halved, then states are kept at several levels; the gradient stays the same.
    """
    if isinstance(strategy, Revolve):
        fewer = [count for count in _FEW_STATES if count < strategy.num_states]
        return Revolve(fewer[0]) if fewer else None
    first, start, stop = window.first, window.start, window.stop
    leaf_steps = plan_window(strategy, first, start, stop).longest_leaf // 2
    if leaf_steps >= max(1, math.isqrt(stop - start) // 4):
        return Uniform(leaf_steps)
    return Revolve(_FEW_STATES[0])
