"""Hands events to all sinks; knows no trainer, so that neither keeps the other alive."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

from tbptt_ckpt.engine.results import WindowResult
from tbptt_ckpt.errors import TbpttWarning
from tbptt_ckpt.module.host import Number
from tbptt_ckpt.trainer.events import EventSink, Notice, UpdateEvent, WindowEvent

_log = logging.getLogger("tbptt_ckpt")
_log.addHandler(logging.NullHandler())  # what is warned about is not printed twice
# Not to be overlooked: they are warned about as well.
_WARNED = ("out_of_memory", "non_finite", "replanned")


class Announcer:
    """Tells sinks what happens."""

    def __init__(self, sinks: Sequence[EventSink]) -> None:
        self._sinks, self._steps = list(sinks), 0
        self._failing: dict[int, str] = {}  # what failed first, of sinks that were warned about

    def reach(self, steps: int) -> None:
        """What is told from here on is told of that many steps trained in total."""
        self._steps = steps

    def window(self, result: WindowResult, epoch: int, total_steps: int | None) -> None:
        """A window has run."""
        event = WindowEvent.of(result, steps=self._steps, total_steps=total_steps, epoch=epoch)
        self._tell("on_window", event)

    def update(self, updates: int, norm: Number | None, learning_rate: float) -> None:
        """The weights were updated; `norm` is that of the gradients."""
        assert norm is not None, "the norm is watched"
        grad_norm, steps = float(norm), self._steps
        event = UpdateEvent(
            steps=steps, updates=updates, grad_norm=grad_norm, learning_rate=learning_rate
        )
        self._tell("on_update", event)

    def notice(self, kind: str, message: str, **figures: Any) -> None:
        """Something else happened."""
        is_warned = kind in _WARNED
        if is_warned:
            warnings.warn(message, TbpttWarning, stacklevel=3)
        level = logging.WARNING if is_warned else logging.INFO
        _log.log(level, "%s after %d steps: %s", kind, self._steps, message)
        notice = Notice(steps=self._steps, kind=kind, message=message, figures=figures)
        self._tell("on_notice", notice)

    def resume_at(self, steps: int) -> None:
        """Training goes on after `steps`."""
        self.reach(steps)
        self._tell("resume_at", steps)

    def flush(self) -> None:
        """Write out what is held back."""
        self._tell("flush")

    def close(self) -> None:
        """Nothing will follow for now."""
        self._tell("close")

    def _tell(self, method: str, *what: object) -> None:
        """Tell all sinks; one that fails is warned about, and told of the next event as well."""
        for number, sink in enumerate(self._sinks):
            try:
                getattr(sink, method)(*what)
            except Exception as error:
                if number not in self._failing:
                    self._failing[number] = method
                    warnings.warn(
                        f"{sink!r}.{method} failed, and is tried again with the next event: "
                        f"{type(error).__name__}: {error}",
                        TbpttWarning,
                        stacklevel=4,
                    )
            else:
                if self._failing.get(number) == method:
                    del self._failing[number]
