"""Runs one window so that a fault leaves either what was before it or what comes after."""

from __future__ import annotations

import math
from itertools import count

import torch
from torch import Tensor

from tbptt_ckpt.engine.parts import Parts
from tbptt_ckpt.engine.results import WindowResult
from tbptt_ckpt.engine.sequence_run import SequenceRun
from tbptt_ckpt.engine.standing import Mark
from tbptt_ckpt.errors import NonFiniteError, OutOfMemoryError, first_line
from tbptt_ckpt.executor.observer import Observer
from tbptt_ckpt.memory.available import free_memory
from tbptt_ckpt.memory.exhausted import is_out_of_memory, release_memory
from tbptt_ckpt.memory.resident import rss_bytes
from tbptt_ckpt.memory.sizes import format_bytes
from tbptt_ckpt.module.host import Number, Numbers
from tbptt_ckpt.module.trees import Tree, is_differentiable, tensors_of
from tbptt_ckpt.schedule.windows import Window
from tbptt_ckpt.trainer.announcer import Announcer
from tbptt_ckpt.trainer.learning_state import poisoned
from tbptt_ckpt.trainer.options import NonFinite, OutOfMemory


class Recovery(Observer):
    """Runs windows under the policies for non-finite numbers and missing memory.

    The parts' budget plans with less when memory is missing.
    """

    def __init__(
        self,
        parts: Parts,
        non_finite: NonFinite,
        out_of_memory: OutOfMemory,
        announcer: Announcer,
    ) -> None:
        self._parts, self._announcer = parts, announcer
        self._non_finite, self._out_of_memory = non_finite, out_of_memory
        self._skipped_in_a_row = 0
        self._window: Window | None = None
        self._loss = self._largest = Number(0.0)
        self.wants_norm = self.wants_undo = True
        self.wants_copies = out_of_memory.protect_update

    def next_window(self, run: SequenceRun) -> Window | None:
        """The run's next window; reading it is tried again where memory is missing."""
        for attempt in count(1):
            try:
                return run.next_window()
            except Exception as error:
                if not is_out_of_memory(error) or attempt > self._out_of_memory.retries:
                    raise
                failure = first_line(error)
            self._note_exhausted(f"reading failed ({failure}); reading again", attempt)
        raise AssertionError("count does not end")

    def run(self, run: SequenceRun, window: Window) -> WindowResult | None:
        """Run the next window of `run`; None where it was skipped.

        Raises:
            NonFiniteError: The policy is to stop; everything is as it was before the window.
            OutOfMemoryError: No plan that was tried fits, with the figures.
        """
        self._window = window
        for attempt in count(1):
            mark: Mark | None = None
            problem = failure = None
            begun = self._num_votes()
            try:
                mark = run.mark()
                result = run.run_window(window)
            except NonFiniteError as error:
                problem = str(error)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failure = first_line(error)
            else:
                self._skipped_in_a_row = 0
                self._tell_of_others()
                return result
            # Here, outside of the except block, the failed call's tensors are free.
            release_memory()
            if mark is not None:
                run.rewind(mark)
                mark = None
            if problem is not None:
                self._skip_or_stop(run, window, problem)
                return None
            if self._num_votes() != begun:
                raise OutOfMemoryError(
                    f"window {window.index} has run, and its update, which all ranks had agreed "
                    f"on, does not fit into memory on this one: {failure} "
                    f"({self._memory_in_words()})"
                )
            self._shrink_or_stop(window, attempt, str(failure))
        raise AssertionError("count does not end")

    def _num_votes(self) -> int:
        ranks = self._parts.updater.deliveries.ranks
        return 0 if ranks is None else ranks.num_votes

    def _tell_of_others(self) -> None:
        ranks = self._parts.updater.deliveries.ranks
        for rank, window in () if ranks is None else ranks.take_repeated():
            message = f"window {window} did not fit on rank {rank}, which has run it again"
            self._announcer.notice("out_of_memory", message, rank=rank)

    def asks(self, numbers: Numbers, loss: Tensor | None, states: list[Tree]) -> None:
        """Ask for a window's loss, and for the largest magnitude in its states."""
        floating = _floating(states)
        self._loss = Number(0.0) if loss is None else numbers.ask(loss)
        self._largest = numbers.ask(torch.nn.utils.get_total_norm(floating, math.inf))

    def differentiated(self, window: Window, loss: Tensor | None, states: list[Tree]) -> None:
        """Look for NaN and infinity in a window's loss and states."""
        if loss is not None and not math.isfinite(self._loss):
            self._found(f"the loss is {float(self._loss)}")
        if math.isfinite(self._largest):
            return
        for tensor in _floating(states):
            if not bool(torch.isfinite(tensor).all()):
                self._found(f"the state, {tuple(tensor.shape)}, holds NaN or infinity")
                return

    def takes_norm(self, norm: Number) -> None:
        """Look for NaN and infinity in the gradients; a scaler does that itself."""
        if self._parts.updater.scaler is None and not math.isfinite(norm):
            self._found(f"the norm of the gradients is {float(norm)}")

    def weights_are_sound(self, steps: int) -> bool:
        """Whether all weights are finite, so that a snapshot of them is of use.

        Ranks that train together all ask, and get the same answer.

        Raises:
            NonFiniteError: They are not, and the policy is not to go on.
        """
        problem, ranks = poisoned(self._parts.weights()), self._parts.updater.deliveries.ranks
        if ranks is not None:  # of shards each has its own
            problem = next(filter(None, ranks.exchange(problem)), "")
        if not problem:
            return True
        message = (
            f"{problem} after {steps} steps, so no snapshot is taken; those before it stay as they "
            "are. A lower learning rate or clip_grad_norm may help"
        )
        if self._non_finite.policy != "go on":
            raise NonFiniteError(message)
        self._announcer.notice("non_finite", message)
        return False

    def _found(self, problem: str) -> None:
        window = self._window
        assert window is not None, "a window is running"
        if weights := poisoned(self._parts.weights()):
            problem = f"{problem} ({weights}, from an earlier update)"
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
        budget = self._parts.budget
        used = budget.strategy
        smaller = None if attempt > self._out_of_memory.retries else budget.shrink(window)
        if smaller is None:
            raise OutOfMemoryError(
                f"window {window.index}, steps {window.start} to {window.stop}, does not fit into "
                f"memory under strategy {used} either, after {attempt} tries: {failure} "
                f"({self._memory_in_words()}). A smaller model, fewer lanes or a smaller k2 take "
                "less"
            )
        self._note_exhausted(
            f"window {window.index} did not fit under strategy {used} ({failure}); running it "
            f"again under {smaller}, from here on equal to other runs to rounding",
            attempt,
        )
        if (ranks := self._parts.updater.deliveries.ranks) is not None:
            ranks.vote_again(window.index)

    def _note_exhausted(self, message: str, attempt: int) -> None:
        resident = rss_bytes().total
        self._announcer.notice("out_of_memory", message, attempt=attempt, rss_bytes=resident)

    def _memory_in_words(self) -> str:
        device = self._parts.device
        return (
            f"{format_bytes(free_memory(device))} free on {device}, "
            f"{format_bytes(rss_bytes().total)} resident"
        )


def _floating(states: list[Tree]) -> list[Tensor]:
    return [t for t in tensors_of(states) if is_differentiable(t) and t.numel()]
