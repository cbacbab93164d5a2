"""What is done with a window that has run, as all ranks that train together say."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tbptt_ckpt.engine.initial_state import InitialState
from tbptt_ckpt.engine.open_window import OpenWindow
from tbptt_ckpt.engine.parts import Parts
from tbptt_ckpt.engine.results import WindowResult
from tbptt_ckpt.engine.standing import Standing
from tbptt_ckpt.errors import ArgumentError, NonFiniteError
from tbptt_ckpt.executor.observer import Observer
from tbptt_ckpt.executor.window_loss import WindowLoss
from tbptt_ckpt.module.host import Number
from tbptt_ckpt.schedule.windows import Window
from tbptt_ckpt.updates.ballots import Ballot, Outcome
from tbptt_ckpt.updates.ranks import RankGroup


@dataclass(frozen=True, slots=True, eq=False)
class Agreed:
    """A window's loss, and what becomes of its gradient.

    Attributes:
        loss: Over all ranks, detached; None where no rank has one.
        number: The same for the host, where there is one.
        factor: Of this rank's gradient; None where it trains alone.
        is_last: Whether no window follows, on any rank.
    """

    loss: Tensor | None
    number: Number
    factor: float | None
    is_last: bool
    _outcome: Outcome | None

    def sums(self, own: WindowLoss | None = None) -> tuple[float, float]:
        """Summed loss and weight; of this rank's `own` loss where it trains alone."""
        if self._outcome is not None:
            return self._outcome.loss_sum, self._outcome.positions
        return (0.0, 0.0) if own is None else (own.loss_sum, float(own.weight))

    def figures(self, own: OpenWindow | None = None) -> dict[str, Any]:
        """What a result says of it; it is `own`, unless others alone have run it."""
        if self._outcome is not None:
            tokens = self._outcome.tokens
        else:
            tokens = 0 if own is None else own.num_tokens()
        return {
            "loss": self.loss,
            "loss_value": None if self.loss is None else float(self.number),
            "num_tokens": tokens,
        }


class Agreement:
    """Says of each window of a run what becomes of it; `observer` is told before.

    Attributes:
        reached: Steps trained so far, of the rank that has come furthest; 0 without ranks.
        is_over: Whether all ranks have run their last window; False without ranks.
        peaks: The highest peak of every rank, once all have ended; None without ranks.
    """

    def __init__(self, parts: Parts, observer: Observer, initial: InitialState) -> None:
        self._parts, self._observer, self._initial = parts, observer, initial
        self.reached, self.is_over = 0, False
        self.peaks: tuple[int | None, ...] | None = None
        self._ranks: RankGroup | None = parts.updater.deliveries.ranks
        if self._ranks is not None and initial.leaves() and not initial.is_shared:
            raise ArgumentError(
                "init_state holds tensors that learn, one for each lane of this rank, and weights "
                "must be those of all ranks; give a SharedState, or detach it"
            )

    def after(self, opened: OpenWindow, window: Window, num_steps: int | None) -> Agreed:
        """A window has run that reached as far back as `window`.

        Raises:
            NonFiniteError: The observer, or another rank, has found what is not finite.
            RankError: Ranks are not where this one is.
        """
        numbers, states = opened.numbers, opened.notes.states()
        is_last, loss = window.stop == num_steps, opened.numbers.loss
        ranks = self._ranks
        if ranks is None:
            self._observer.differentiated(window, loss, states)
            return Agreed(loss, numbers.loss_number, None, is_last, None)
        here: dict[str, Any] = {"window": window.index, "reached": window.stop, "is_last": is_last}
        try:
            self._observer.differentiated(window, loss, states)
        except NonFiniteError:
            with suppress(NonFiniteError):  # the others then know as much as this rank
                self._vote(ranks, Ballot(**here, is_fault=True))
            raise
        positions = 0.0 if loss is None else opened.loss.positions
        weight = 1.0 if ranks.sums else positions
        ballot = Ballot(
            **here,
            loss_sum=0.0 if loss is None else float(numbers.loss_number) * weight,
            positions=positions,
            tokens=opened.num_tokens(),
            has_loss=loss is not None,
        )
        return self._vote(ranks, ballot, loss)

    def learned(self, opened: OpenWindow, agreed: Agreed) -> dict[str, Any]:
        """What is known of how far back a window that is done has reached."""
        draw, norms, has_loss = opened.draw, opened.borders.norms, agreed.loss is not None
        truncation = self._parts.truncation
        return truncation.has_run(draw, norms, has_loss=has_loss, factor=agreed.factor)

    @property
    def takes_part(self) -> bool:
        """Whether other ranks have windows yet, where this one's sequence has ended."""
        return self._ranks is not None and not self.is_over

    def take_part(self, window: Window, before: Standing) -> tuple[WindowResult, Standing]:
        """Other ranks run a window that has no steps here: update the weights as they do.

        Raises:
            NonFiniteError: One of them has found what is not finite.
            RankError: Weights have come to differ, or a rank is gone.
        """
        assert self._ranks is not None, "there are others"
        begun, updater, leaves = time.perf_counter(), self._parts.updater, self._initial.leaves()
        updater.deliveries.begin()
        updater.clear(leaves)
        self._parts.shared_costs.plan(lambda: None)
        agreed = self._vote(self._ranks, Ballot())
        if agreed.loss is not None:
            updater.add(agreed.loss, agreed.number)
        updated = updater.update(agreed.is_last, leaves, self._observer)
        self._parts.truncation.has_passed(window.index, has_loss=agreed.loss is not None)
        last = before.records.carried
        result = WindowResult(
            **asdict(window),
            state=None if last is None else last.state,
            recomputed_steps=0,
            peak_bytes=None,
            reserved_peak_bytes=None,
            drift=0.0,
            seconds=time.perf_counter() - begun,
            plan=None,
            updated=updated,
            **agreed.figures(),
        )
        totals = before.totals.plus(result, *agreed.sums())
        return result, replace(before, index=window.index + 1, totals=totals)

    def finish(self, peak_bytes: int | None) -> None:
        """All sequences have ended; `peak_bytes` is the highest peak here, which others are told.

        Raises:
            RankError: Weights have come to differ, or a rank is gone.
        """
        if self._ranks is not None:
            self._ranks.compare()
            self.peaks = self._ranks.told(peak_bytes)

    def go_on(self, reached: int | None = None, *, have_ended: bool = False) -> None:
        """Begin where a rank has `reached` so many steps, and all sequences `have_ended` or not."""
        self.reached = self.reached if reached is None else reached
        self.is_over = have_ended

    def _vote(self, ranks: RankGroup, ballot: Ballot, own: Tensor | None = None) -> Agreed:
        outcome = ranks.vote(ballot)
        self.reached, self.is_over = outcome.reached, outcome.is_last
        if outcome.fault:
            raise NonFiniteError(outcome.fault)
        loss = None
        if outcome.loss is not None:
            dtype = torch.float64 if own is None else own.dtype
            loss = torch.tensor(outcome.loss, dtype=dtype, device=self._parts.device)
        return Agreed(loss, Number(outcome.loss), outcome.factor, outcome.is_last, outcome)
