"""A loss on other data now and then: the best state is kept, and a run without progress ends."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tbptt_ckpt.arguments import PositiveInt, check_fields
from tbptt_ckpt.data.batches import Sequences
from tbptt_ckpt.data.steps import check_sequence
from tbptt_ckpt.engine.tbptt import TBPTT
from tbptt_ckpt.errors import ArgumentError, shown
from tbptt_ckpt.trainer.announcer import Announcer
from tbptt_ckpt.trainer.options import Snapshots, Stateful
from tbptt_ckpt.trainer.saving import NoSnapshots, Saving
from tbptt_ckpt.updates.ranks import RankGroup

EXTRA = "validation"  # its name among what a trainer saves besides


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """When a trainer looks at other data, and when it has seen enough.

    With snapshots, the state with the lowest loss is kept in `best/` in their directory:
    `Trainer.resume(best=True)` goes back to it. Of ranks that train together each looks at data of
    its own, such as `own_lanes(source)`; the loss is that of all.

    Attributes:
        source: As for `TBPTT.evaluate`; read anew each time.
        every_windows: Windows from one look to the next.
        patience: Looks without a lower loss, one after the other, after which training ends; None
            goes on.
        init_state: The state that it begins with, or a function that returns it.
        segment_steps: As for `evaluate`.
    """

    source: Sequences
    every_windows: PositiveInt = 100
    patience: PositiveInt | None = None
    init_state: Any = None
    segment_steps: PositiveInt = 64

    def __post_init__(self) -> None:
        check_fields(self)
        check_sequence(self.source)
        if isinstance(self.source, Iterator):
            raise ArgumentError(
                f"source={shown(self.source)} can be read once only; give a source, a list of "
                "steps, or Batches"
            )


class Validating:
    """Validates when it is due; saved and resumed with the run.

    Attributes:
        best: Where the best state is kept.
        best_loss: Of all looks so far; None before the first.
        best_steps: Steps that had been trained then.
    """

    best_loss: float | None = None
    best_steps: int | None = None

    def __init__(
        self, given: Validation, snapshots: Snapshots | None, tbptt: TBPTT, announcer: Announcer
    ) -> None:
        self._given, self._tbptt, self._announcer = given, tbptt, announcer
        self._ranks = tbptt.parts.updater.deliveries.ranks
        self._windows = self._without_progress = 0
        self.best: Saving = NoSnapshots() if snapshots is None else _Best(snapshots, self._ranks)

    @property
    def is_over(self) -> bool:
        """Whether there has been no progress for as long as was allowed."""
        return self._given.patience is not None and self._without_progress >= self._given.patience

    def beside(self, extra: dict[str, Stateful]) -> dict[str, Stateful]:
        """What a trainer saves besides, this included."""
        if EXTRA in extra:
            raise ArgumentError(f"extra has {EXTRA!r}, which is the name of what validation saves")
        return {**extra, EXTRA: self}

    def look(self, windows: int, steps: int, state_dict: Callable[[], Any]) -> None:
        """Validate after so many windows and steps, if it is time."""
        given = self._given
        if windows // given.every_windows <= self._windows // given.every_windows:
            return
        self._windows = windows
        first = given.init_state() if callable(given.init_state) else given.init_state
        found = self._tbptt.evaluate(given.source, first, segment_steps=given.segment_steps)
        loss = found.loss if self._ranks is None else self._ranks.mean(found.loss, found.positions)
        if loss is None:
            raise ArgumentError("validation.source has no step with a target that counts")
        is_better = loss < (math.inf if self.best_loss is None else self.best_loss)
        self._without_progress += 1
        if is_better:
            self.best_loss, self.best_steps, self._without_progress = loss, steps, 0
            self.best.save(steps, state_dict)
        words = "the best" if is_better else f"best {self.best_loss} after {self.best_steps} steps"
        figures = {"loss": loss, "best_loss": self.best_loss, "best_steps": self.best_steps}
        self._announcer.notice("validated", f"loss {loss}, {words}", **figures)

    def state_dict(self) -> dict[str, Any]:
        """How far it is."""
        names = ("best_loss", "best_steps", "_windows", "_without_progress")
        return {name.removeprefix("_"): getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.best_loss, self.best_steps = state["best_loss"], state["best_steps"]
        self._windows, self._without_progress = state["windows"], state["without_progress"]


class NotValidating(Validating):
    """Looks at nothing, where no validation was asked for."""

    is_over = False

    def __init__(self) -> None:
        """It has nothing to look at."""
        self.best = NoSnapshots()

    def beside(self, extra: dict[str, Stateful]) -> dict[str, Stateful]:
        """As they are."""
        return extra

    def look(self, windows: int, steps: int, state_dict: Callable[[], Any]) -> None:
        """Look at nothing."""


class _Best(Saving):
    """Keeps the last state that it was given, beside the run's snapshots."""

    def __init__(self, options: Snapshots, ranks: RankGroup | None) -> None:
        directory = Path(options.directory) / "best"
        super().__init__(replace(options, directory=directory, keep=sys.maxsize), ranks=ranks)

    def save(self, steps: int, state_dict: Callable[[], Any]) -> Path | None:
        """Write it, then remove what was there."""
        path = super().save(steps, state_dict)
        if path is not None and self._is_first:
            self._store.keep_only(steps)
        return path
