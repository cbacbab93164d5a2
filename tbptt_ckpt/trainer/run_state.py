"""How far a run has come, and everything that an equal one needs to go on from there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tbptt_ckpt.data.steps import NoSteps
from tbptt_ckpt.engine.results import WindowResult
from tbptt_ckpt.engine.sequence_run import SequenceRun
from tbptt_ckpt.engine.tbptt import TBPTT
from tbptt_ckpt.trainer.devices import moved
from tbptt_ckpt.trainer.identity import RunIdentity
from tbptt_ckpt.trainer.learning_state import learning_state, load_learning_state, stored_state
from tbptt_ckpt.trainer.options import Stateful
from tbptt_ckpt.trainer.passes import Passes
from tbptt_ckpt.trainer.progress import Progress, Session, TrainerResult
from tbptt_ckpt.trainer.randomness import random_state, set_random_state
from tbptt_ckpt.trainer.rank_states import on_all, saved_ranks, state_of
from tbptt_ckpt.trainer.resplitting import resplit, resplit_message
from tbptt_ckpt.trainer.resuming import (
    all_or_nothing,
    check_run,
    loaded_progress,
    plan_state,
    resume_plan,
    resume_run,
)
from tbptt_ckpt.trainer.schema import check_schema
from tbptt_ckpt.trainer.sharded_state import ReadShards, as_held, check_shards, no_shards


class RunState:
    """What a run has done, and the sequence that it is in.

    Attributes:
        progress: What has been counted.
        session: What this process has counted of it.
        run: Runs the present sequence; None between two of them.
    """

    def __init__(
        self,
        tbptt: TBPTT,
        passes: Passes,
        extra: Mapping[str, Stateful],
        others: Mapping[str, Any],
        max_steps: int | None,
    ) -> None:
        self._parts, self._passes, self._k1 = tbptt.parts, passes, tbptt.options.k1
        self._extra, self._max_steps = dict(extra), max_steps
        self._ranks = self._parts.updater.deliveries.ranks
        self._asked = str(self._parts.budget.strategy)
        self.identity = RunIdentity(tbptt, {**others, "extra": sorted(extra)}, passes.sample)
        self.progress, self.session = Progress(), Session()
        self.run: SequenceRun | None = None

    @property
    def num_steps(self) -> int:
        """Steps trained so far, in total."""
        trained = 0 if self.run is None else self.run.num_steps
        return self.progress.steps_before + trained

    def begin(self) -> None:
        """Training begins in this process, or goes on."""
        self.session = Session()
        self.identity.begin()

    def begin_sequence(self) -> SequenceRun | None:
        """The present sequence, or the next one; None where the pass has ended, and is counted."""
        if self.run is None:
            self.run = self._passes.begin(*self.progress.place, is_somewhere=self._is_somewhere)
            if self.run is None:
                self.progress.end_pass()
        elif self._ranks is not None:  # it goes on from a snapshot, perhaps to another end
            have_ended = self._ranks.exchange(self.run.has_ended())
            self.run.agreement.go_on(have_ended=all(have_ended))
        return self.run

    def _is_somewhere(self, is_here: bool) -> bool:
        return is_here if self._ranks is None else any(self._ranks.exchange(is_here))

    def end_sequence(self) -> None:
        """The present sequence has been run to its end."""
        assert self.run is not None, "a sequence has run"
        self.run.finish()
        self.progress.end_sequence(self.num_steps)
        self.run = None

    def add(self, result: WindowResult | None) -> None:
        """Count a window; None for one that was skipped."""
        self.progress.add(result)
        if result is not None:
            self.session.add(result)

    def result(self, best_loss: float | None, best_steps: int | None) -> TrainerResult:
        """The same for the user, with the best that a validation has found."""
        return self.progress.result(self.num_steps, self.session, best_loss, best_steps)

    def state_dict(self) -> dict[str, Any]:
        """All of it; the tensors are the run's own."""
        progress, run = self.progress, self.run
        check_shards(self._parts.updater.optimizer)
        return {
            "learning": learning_state(self._parts),
            "progress": {name: getattr(progress, name) for name in progress.__slots__},
            "run": None if run is None else run.state_dict(),
            "device": str(self._parts.device),
            "limit": None if run is None else self._passes.limit,
            "init_state": [] if run is None else stored_state(run.initial.given),
            "plan": plan_state(self._parts, self._asked),
            "truncation": self._parts.truncation.state_dict(),
            "reach": self._parts.reach.state_dict(),
            "identity": self.identity.state_dict(),
            "ranks": None if self._ranks is None else {**self._place(), "others": []},
            "extra": {name: owner.state_dict() for name, owner in self._extra.items()},
            "random": random_state(self._parts.weights()),
        }

    def load_state_dict(
        self, state: Mapping[str, Any], accept: Sequence[str], read: ReadShards = no_shards
    ) -> list[tuple[str, str]]:
        """Go on where `state_dict` was called; kind and words of what is to be told of it.

        `read` fills what ranks hold together. All ranks call it, and all fail where one does.

        Raises:
            ArgumentError: It is of another run.
            SnapshotError: It is of no run. In both cases everything is as it was before.
        """
        run, told, ranks = None, list[tuple[str, str]](), self._ranks
        with all_or_nothing(state, self._parts, self._passes, self._extra.values()), on_all(ranks):
            is_joint = ranks is not None or state.get("ranks") is not None
            if is_joint:
                state = self._of_this_rank(state, told)
            accepted = self.identity.differences(state, accept)
            progress = loaded_progress(state, self._k1, self._max_steps)
            device = self._parts.device
            there = moved(state["run"], state["device"], device, is_on_host=is_joint)
            check_run(there, self._parts)
            learning = as_held(self._parts, state["learning"], read)
            load_learning_state(self._parts, learning, accepted)
            if there is not None:
                had_no_steps = there["reader"].get("source") == NoSteps().state_dict()
                run = self._passes.begin(
                    *progress.place,
                    state["init_state"],
                    is_somewhere=lambda is_here: is_here or had_no_steps,
                )
                saved = {**state, "run": there}
                resume_run(run, saved, self._passes.limit, self._k1, accepted)
            for name in self._extra.keys() & state["extra"].keys():
                self._extra[name].load_state_dict(state["extra"][name])
            if "truncation" in state:  # older snapshots have none
                self._parts.truncation.load_state_dict(state["truncation"])
            if "reach" in state:
                self._parts.reach.load_state_dict(state["reach"])
            set_random_state(state["random"], self._parts.weights())
            messages = resume_plan(self._parts, self._asked, state["plan"], state["device"])
        self.progress, self.session, self.run = progress, Session(), run
        told += [("replanned", message) for message in messages]
        return told + [("accepted", f"{name}={what}") for name, what in accepted.items()]

    def _place(self) -> dict[str, int]:
        """Which rank this is, of how many."""
        rank, count = (0, 1) if self._ranks is None else (self._ranks.rank, self._ranks.count)
        return {"rank": rank, "count": count}

    def _of_this_rank(
        self, state: Mapping[str, Any], told: list[tuple[str, str]]
    ) -> Mapping[str, Any]:
        """What this rank goes on with, of a state of its own or of all that saved.

        Raises:
            ArgumentError: It is that of another one, or cannot be split.
        """
        place = self._place()
        if state.get("ranks") == {**place, "others": []}:
            return state
        saved, rank, count = saved_ranks(state), place["rank"], place["count"]
        if saved == count:
            found = state_of(state, rank)
        else:
            lane_dim, is_shared = self._parts.recurrence.lane_dim, self._passes.begins_shared()
            states = [state_of(state, each) for each in range(saved)]
            found = resplit(states, rank, count, lane_dim, is_shared=is_shared)
            if rank >= saved:
                found["random"] = random_state(self._parts.weights())
            told.append(("resplit", resplit_message(saved, count)))
        check_schema(found)
        return found
