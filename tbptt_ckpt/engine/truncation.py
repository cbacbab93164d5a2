"""How far back each window of an engine reaches, drawn window by window."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from tbptt_ckpt.engine.options import Options
from tbptt_ckpt.errors import TbpttWarning
from tbptt_ckpt.executor.observer import UNOBSERVED, Observer
from tbptt_ckpt.module.host import Number
from tbptt_ckpt.schedule.truncation import Draw, draw
from tbptt_ckpt.schedule.windows import Window

_GROWING = 3  # windows in a row whose gradient grows are told of


class Truncation:
    """Draws for the windows of all runs of an engine, which differ from run to run.

    Attributes:
        observer: What has to see how they run.
    """

    observer: Observer = UNOBSERVED

    def __init__(self, options: Options) -> None:
        self._roulette, self._k1 = options.parsed_truncation(), options.k1
        self._restarts = options.is_stale
        self._drawn = 0  # windows that have run
        self._growing = 0  # of them, the last ones whose gradient grew
        self._has_warned = False

    def of(self, window: Window) -> Draw:
        """How far it goes back; the same until it has run, however often it is asked for."""
        if self._roulette is None or window.start >= window.new_start:
            return Draw(window, window)
        number = self._roulette.number(self._drawn)
        return draw(window, self._roulette, self._k1, number, restarts=self._restarts)

    def has_run(
        self, drawn: Draw, norms: Mapping[int, Number], *, has_loss: bool, factor: float | None
    ) -> dict[str, Any]:
        """A window is done; `norms` of the state's gradient arrived at borders.

        Args:
            drawn: How far it went back.
            norms: By border.
            has_loss: Whether any rank has one.
            factor: Of this rank's gradient in the mean over ranks; None where it trains alone.

        Returns:
            Further figures of it.
        """
        if self._roulette is not None:
            self._drawn += 1
            self._look_at_growth(drawn, norms)
        return {"survival": drawn.survival}

    def has_passed(self, index: int, *, has_loss: bool) -> None:
        """Other ranks have run a window, and this one's sequence has ended."""
        if self._roulette is not None:
            self._drawn += 1

    def _look_at_growth(self, drawn: Draw, norms: Mapping[int, Number]) -> None:
        crossed = [border for border in drawn.divisors if border in norms]
        if self._has_warned or len(crossed) < 2:
            return
        near, far = crossed[0], crossed[-1]
        before = drawn.survival / drawn.divisors[far]  # what arrived there was divided by it
        grown = float(norms[far]) * before > float(norms[near]) > 0
        self._growing = self._growing + 1 if grown else 0
        if self._growing == _GROWING:
            self._has_warned = True
            times = float(norms[far]) * before / float(norms[near])
            warnings.warn(
                f"truncation={self._roulette}: the gradient of the state grows with distance, "
                f"{times:.3g} times over {near - far} steps in window {drawn.window.index} and "
                f"in {_GROWING} windows in a row of those that cross two borders: it explodes, and "
                "what is drawn seldom counts most. Where it goes on growing, drawing takes more "
                "work than the whole walk: roulette_price says how much. Use truncation='fixed', "
                "and recurrent weights that let it decay",
                TbpttWarning,
                stacklevel=2,
            )

    def held(self) -> object:
        """Trees of tensors that are live between windows."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Where the draws stand, and what has been told of them."""
        told = {"growing": self._growing, "has_warned": self._has_warned}
        return {"drawn": self._drawn, **told, "audits": None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._drawn = state["drawn"]
        self._growing = state.get("growing", 0)  # older snapshots have neither
        self._has_warned = state.get("has_warned", False)
