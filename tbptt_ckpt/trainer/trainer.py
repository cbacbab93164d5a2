"""`Trainer`: passes over a source, saved and resumed, watched and logged."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tbptt_ckpt.arguments import PositiveInt, checked
from tbptt_ckpt.engine.results import WindowResult
from tbptt_ckpt.engine.sequence_run import SequenceRun
from tbptt_ckpt.engine.tbptt import TBPTT
from tbptt_ckpt.errors import ArgumentError, shown
from tbptt_ckpt.executor.observer import together
from tbptt_ckpt.module.recurrence import check_differentiable
from tbptt_ckpt.trainer.announcer import Announcer
from tbptt_ckpt.trainer.events import EventSink
from tbptt_ckpt.trainer.options import NonFinite, OutOfMemory, Snapshots, Stateful, check_offers
from tbptt_ckpt.trainer.passes import Passes, PlanObserver, StepsOfPasses
from tbptt_ckpt.trainer.progress import TrainerResult, out_of
from tbptt_ckpt.trainer.recovery import Recovery
from tbptt_ckpt.trainer.run_state import RunState
from tbptt_ckpt.trainer.saving import NoSnapshots, Saving
from tbptt_ckpt.trainer.sharded_state import ReadShards, no_shards, shards_of
from tbptt_ckpt.trainer.signals import StopSignals, TrainingStopped
from tbptt_ckpt.trainer.validation import NotValidating, Validating, Validation


class Trainer:
    """Trains over passes of a source, and survives what happens to its process.

    A pass ("epoch") begins at step 0 with the first state. Between any two windows the whole
    state can be saved and resumed: on the CPU a resumed run is bitwise one that never
    stopped, in the middle of a sequence too.

    Args:
        tbptt: The engine, with its optimizer.
        source: A source or an iterable of `(input, target)` steps that can be iterated anew
            for each pass and after a resume; `Batches`, each of which is a sequence of its own; or
            a function of the pass's number that returns one of these. A source with `set_epoch`
            is told the pass's number.
        init_state: The state at the start of a sequence, or a function that returns it.
        epochs: Passes in total; None for as many as `max_steps` takes.
        max_steps: Steps in total, over all passes and processes.
        snapshots: Where and when to save; None saves nothing. Ranks that train together save at
            the same steps, in one snapshot, which any number of them can take up.
        validation: What else to look at now and then, to keep the best state and to end early.
        events: Told of windows, updates and faults. With snapshots, `events.jsonl` is written
            in their directory whatever is given here.
        non_finite: What to do about NaN and infinity.
        out_of_memory: What to do about missing memory.
        extra: Objects with `state_dict` and `load_state_dict`, saved and resumed as well.
        identity: What else must be equal in a resumed run; plain values.

    Raises:
        ArgumentError: Arguments that cannot work.
    """

    @checked
    def __init__(
        self,
        tbptt: TBPTT,
        source: StepsOfPasses,
        *,
        init_state: Any = None,
        epochs: PositiveInt | None = 1,
        max_steps: PositiveInt | None = None,
        snapshots: Snapshots | None = None,
        validation: Validation | None = None,
        events: Sequence[EventSink] = (),
        non_finite: NonFinite | None = None,
        out_of_memory: OutOfMemory | None = None,
        extra: Mapping[str, Stateful] | None = None,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        if epochs is None and max_steps is None:
            raise ArgumentError("epochs=None needs max_steps, or training would never end")
        if isinstance(source, Iterator) and (epochs or 0) > 1:
            raise ArgumentError(
                f"source={shown(source)} can be read once only, and epochs={epochs}; give a list "
                "of steps, a source, or a function of the pass's number that makes one"
            )
        check_offers(events, extra or {})
        self.tbptt, self._parts = tbptt, tbptt.parts
        self._epochs, self._max_steps = epochs, max_steps
        self._ranks = self._parts.updater.deliveries.ranks
        self._saving = NoSnapshots() if snapshots is None else Saving(snapshots, ranks=self._ranks)
        self._announcer = Announcer((*self._saving.sinks, *events))
        self._validating = (
            NotValidating()
            if validation is None
            else Validating(validation, snapshots, tbptt, self._announcer)
        )
        policies = non_finite or NonFinite(), out_of_memory or OutOfMemory()
        self._recovery = Recovery(self._parts, *policies, self._announcer)
        observer = together(self._recovery, PlanObserver(self._save_costs))
        passes = Passes(tbptt, source, init_state, max_steps, observer)
        saved = self._validating.beside(dict(extra or {}))
        self._state = RunState(tbptt, passes, saved, identity or {}, max_steps)
        self._saved_costs, self._total_steps = 0, passes.total_steps(epochs)

    def __repr__(self) -> str:
        epochs = out_of(self._state.progress.epoch, self._epochs, "epochs")
        steps = out_of(self.num_steps, self._max_steps, "steps")
        return f"Trainer({epochs}, {steps}{self._saving})"

    @property
    def num_steps(self) -> int:
        """Steps trained so far, in total."""
        return self._state.num_steps

    @property
    def num_updates(self) -> int:
        """Updates made so far, in total."""
        return self._state.progress.updates

    def train(self) -> TrainerResult:
        """Train until the passes or steps are done, from where the trainer stands.

        Raises:
            TrainingStopped: SIGTERM or SIGINT arrived; a snapshot was taken.
            NonFiniteError, OutOfMemoryError, SnapshotError: As the policies say.
        """
        for _ in self._windows(StopSignals()):
            pass
        return self.result()

    def result(self) -> TrainerResult:
        """What has been done so far; its seconds count from the last call of `windows`."""
        return self._state.result(self._validating.best_loss, self._validating.best_steps)

    def windows(self) -> Iterator[WindowResult]:
        """The same, one window at a time; a snapshot is taken when the next is asked for.

        One of other ranks, where this rank's sequence has ended, is among them, without steps.
        Between windows SIGINT interrupts your own code, as ever.
        """
        for result in self._windows(signals := StopSignals()):
            with signals.paused():
                yield result

    def _windows(self, signals: StopSignals) -> Iterator[WindowResult]:
        check_differentiable(self._parts.recurrence.module)
        self._state.begin()
        self._saving.begin()
        with ExitStack() as stack:
            stack.callback(self._announcer.close)
            stack.callback(self._saving.close)
            stack.enter_context(signals)
            if self._ranks is not None:
                self._total_steps = self._ranks.most(self._total_steps)
            self._between_windows(signals)
            while not self._is_done():
                for result in self._rest_of_pass():
                    yield result
                    self._between_windows(signals)
            if self._state.run is not None:
                self._state.run.finish()
            if not self._saving.is_saved(self.num_steps):
                self._save()

    @checked
    def resume(self, *, accept: Sequence[str] = (), best: bool = False) -> bool:
        """Load the newest valid snapshot; False where there is none, to start afresh.

        Args:
            accept: What may differ from the run that was saved, such as ("lr", "data").
            best: Load the state that had the lowest loss under `validation` instead, to use the
                module; training goes on from the newest.

        Raises:
            ArgumentError: No snapshots were asked for, or they are of another run.
            SnapshotError: None of the snapshots can be used. Either leaves all as it was.
        """
        saving = self._validating.best if best else self._saving
        saving.check("resume()")
        loaded = saving.load(lambda each: self._load(each.state, accept, shards_of(each)))
        if best:
            saving.close()
        if loaded is None:
            return False
        self._announcer.resume_at(self.num_steps)
        self._announcer.notice("resumed", f"from {loaded.path}", versions=loaded.manifest.versions)
        self._announcer.close()  # until training begins, if it does
        return True

    def save(self) -> Path | None:
        """Take a snapshot now, between windows.

        Raises:
            NonFiniteError: The weights hold NaN or infinity.
            SnapshotError: It cannot be written, as the options say.
        """
        self._saving.check("save()")
        return self._save()

    def _save(self) -> Path | None:
        begun = time.perf_counter()
        if not self._recovery.weights_are_sound(self.num_steps):
            self._saving.put_off(self.num_steps)
            return None
        self._announcer.flush()
        path = self._saving.save(self.num_steps, self.state_dict)
        if path is not None:
            seconds = time.perf_counter() - begun
            self._announcer.notice("snapshot", str(path), seconds=seconds)
        return path

    def state_dict(self) -> dict[str, Any]:
        """Everything that a run equal to this one needs to go on from here.

        The tensors are the run's own; write them out before the next window. Where ranks train
        together it is for this rank, of as many; snapshots are for all of them.
        """
        return self._state.state_dict()

    @checked
    def load_state_dict(self, state: Mapping[str, Any], *, accept: Sequence[str] = ()) -> None:
        """Go on where `state_dict` was called; `accept` as for `resume`. All ranks call it.

        Raises:
            ArgumentError: It is of another run.
            SnapshotError: It is of no run. In both cases everything is as it was before.
        """
        self._load(state, accept)

    def _load(self, state: Any, accept: Sequence[str], read: ReadShards = no_shards) -> None:
        told = self._state.load_state_dict(state, accept, read)
        self._saved_costs = self._parts.budget.costs is not None and self._parts.budget.times_made
        for kind, message in told:
            self._announcer.notice(kind, message)

    def _is_done(self) -> bool:
        if self._validating.is_over:
            return True
        bounds = ((self.num_steps, self._max_steps), (self._state.progress.epoch, self._epochs))
        return any(most is not None and done >= most for done, most in bounds)

    def _rest_of_pass(self) -> Iterator[WindowResult]:
        if (run := self._state.begin_sequence()) is None:
            return
        yield from self._windows_of(run)
        if not self._is_done():
            self._state.end_sequence()

    def _windows_of(self, run: SequenceRun) -> Iterator[WindowResult]:
        while not self._is_done() and (window := self._recovery.next_window(run)) is not None:
            rate = self._parts.updater.learning_rate
            result = self._recovery.run(run, window)
            self._state.add(result)
            self._announcer.reach(self.num_steps)
            if result is not None:
                if result.updated:
                    self._announcer.update(self.num_updates, self._parts.updater.grad_norm, rate)
                self._announcer.window(result, self._state.progress.epoch, self._total_steps)
                yield result

    def _save_costs(self) -> None:
        """Save measured costs before the first update; measured again they would differ."""
        budget = self._parts.budget
        if self._saved_costs != budget.times_made and budget.costs is not None:
            self._saved_costs = budget.times_made
            if self._ranks is None:  # others measure at other times, and do not wait
                self._save()

    def _between_windows(self, signals: StopSignals) -> None:
        received, is_due = signals.received or 0, self._saving.is_due(self.num_steps)
        if self._ranks is not None:
            received, is_due = self._ranks.agreed(received, saves=is_due)
        if received:
            if not self._saving.is_saved(self.num_steps):
                self._save()
            word = "interrupted" if received == signal.SIGINT else "terminated"
            message = self._saving.stop_message(word, self.num_steps)
            self._announcer.notice("stopped", message)
            raise TrainingStopped(received, message)
        self._validating.look(self._state.progress.windows, self.num_steps, self.state_dict)
        if is_due and not self._saving.is_saved(self.num_steps):
            self._save()
        if self._ranks is not None:
            self._ranks.wish(signals.received or 0, saves=self._saving.is_due(self.num_steps))
