"""Hands events to all sinks; knows no trainer, so that neither keeps the other alive."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from tbptt_ckpt.engine.results import WindowResult
from tbptt_ckpt.errors import TbpttWarning
from tbptt_ckpt.trainer.events import EventSink, Notice, UpdateEvent, WindowEvent

# Not to be overlooked: they are warned about as well.
_WARNED = ("out_of_memory", "non_finite", "replanned")


class Announcer:
    """Tells sinks what happens."""

    def __init__(self, sinks: Sequence[EventSink]) -> None:
        self._sinks, self._steps = list(sinks), 0

    def reach(self, steps: int) -> None:
        """What is told from here on is told of that many steps trained in total."""
        self._steps = steps

    def window(self, result: WindowResult, epoch: int) -> None:
        """A window has run."""
        event = WindowEvent.of(result, steps=self._steps, epoch=epoch)
        for sink in self._sinks:
            sink.on_window(event)

    def update(self, updates: int, grad_norm: float, learning_rate: float) -> None:
        """The weights were updated."""
        event = UpdateEvent(
            steps=self._steps, updates=updates, grad_norm=grad_norm, learning_rate=learning_rate
        )
        for sink in self._sinks:
            sink.on_update(event)

    def notice(self, kind: str, message: str, **figures: Any) -> None:
        """Something else happened."""
        if kind in _WARNED:
            warnings.warn(message, TbpttWarning, stacklevel=3)
        notice = Notice(steps=self._steps, kind=kind, message=message, figures=figures)
        for sink in self._sinks:
            sink.on_notice(notice)

    def resume_at(self, steps: int) -> None:
        """Training goes on after `steps`."""
        self.reach(steps)
        for sink in self._sinks:
            sink.resume_at(steps)

    def flush(self) -> None:
        """Write out what is held back."""
        for sink in self._sinks:
            sink.flush()

    def close(self) -> None:
        """Nothing will follow for now."""
        for sink in self._sinks:
            sink.close()
