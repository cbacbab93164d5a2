"""What is done with a window that has run, as all ranks that train together say."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tbptt_ckpt.engine.initial_state import InitialState
from tbptt_ckpt.engine.open_window import OpenWindow
from tbptt_ckpt.engine.parts import Parts
from tbptt_ckpt.errors import ArgumentError, NonFiniteError
from tbptt_ckpt.executor.observer import Observer
from tbptt_ckpt.executor.window_loss import WindowLoss
from tbptt_ckpt.module.host import Number
from tbptt_ckpt.schedule.windows import Window
from tbptt_ckpt.updates.ranks import Ballot, Outcome, RankGroup


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

    def sums(self, own: WindowLoss) -> tuple[float, float]:
        """Summed loss and weight; of this rank's `own` loss where it trains alone."""
        if self._outcome is None:
            return own.loss_sum, float(own.weight)
        return self._outcome.loss_sum, self._outcome.positions

    def figures(self, own: OpenWindow) -> dict[str, Any]:
        """What a result says of it."""
        return {
            "loss": self.loss,
            "loss_value": None if self.loss is None else float(self.number),
            "num_tokens": own.num_tokens() if self._outcome is None else self._outcome.tokens,
        }


class Agreement:
    """Says of each window of a run what becomes of it; `observer` is told before.

    Attributes:
        peaks: The highest peak of every rank, once all have ended; None without ranks.
    """

    def __init__(self, parts: Parts, observer: Observer, initial: InitialState) -> None:
        self._parts, self._observer, self._initial = parts, observer, initial
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
        try:
            self._observer.differentiated(window, loss, states)
        except NonFiniteError:
            _vote_fault(ranks, Ballot(window=window.index, is_last=is_last, is_fault=True))
            raise
        positions = 0.0 if loss is None else opened.loss.positions
        weight = 1.0 if ranks.sums else positions
        ballot = Ballot(
            window=window.index,
            loss_sum=0.0 if loss is None else float(numbers.loss_number) * weight,
            positions=positions,
            tokens=opened.num_tokens(),
            has_loss=loss is not None,
            is_last=is_last,
        )
        return self._of(ranks, ranks.vote(ballot), loss)

    def learned(self, opened: OpenWindow, agreed: Agreed) -> dict[str, Any]:
        """What is known of how far back a window that is done has reached."""
        draw, norms, has_loss = opened.draw, opened.borders.norms, agreed.loss is not None
        truncation = self._parts.truncation
        return truncation.has_run(draw, norms, has_loss=has_loss, factor=agreed.factor)

    def finish(self, peak_bytes: int | None, index: int) -> None:
        """This rank's sequence has ended: take part in the updates of others, until theirs have.

        `peak_bytes` is the highest peak of its windows, which others are told; `index` is that
        of the window which does not follow.

        Raises:
            RankError: Weights have come to differ, or a rank is gone.
        """
        if (ranks := self._ranks) is None:
            return
        updater, leaves = self._parts.updater, self._initial.leaves()
        while not ranks.is_last:
            updater.deliveries.begin()
            updater.clear(leaves)
            agreed = self._of(ranks, ranks.vote(Ballot()), None)
            if agreed.loss is not None:
                updater.add(agreed.loss, agreed.number)
            updater.update(agreed.is_last, leaves, self._observer)
            self._parts.truncation.has_passed(index, has_loss=agreed.loss is not None)
            index += 1
        ranks.compare()
        self.peaks = ranks.told(peak_bytes)

    def _of(self, ranks: RankGroup, outcome: Outcome, own: Tensor | None) -> Agreed:
        loss = None
        if outcome.loss is not None:
            dtype = torch.float64 if own is None else own.dtype
            loss = torch.tensor(outcome.loss, dtype=dtype, device=self._parts.device)
        return Agreed(loss, Number(outcome.loss), outcome.factor, ranks.is_last, outcome)


def _vote_fault(ranks: RankGroup, ballot: Ballot) -> None:
    """Tell the others, who then know as much as this rank."""
    with suppress(NonFiniteError):
        ranks.vote(ballot)
