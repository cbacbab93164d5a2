"""Signals that ask a run to stop: the first is noted, a second ends the process."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# A closed terminal sends SIGHUP; not every system has it.
_NAMES = ("SIGTERM", "SIGINT", "SIGHUP")
SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


class TrainingStopped(SystemExit):
    """A signal stopped the run between two windows; `code` is 128 + its number.

    As a `SystemExit` it ends the process with that code unless it is caught.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(128 + signum)
        self.signum, self.message = signum, message

    def __str__(self) -> str:
        return self.message


class StopSignals:
    """Notes SIGTERM, SIGINT and SIGHUP while entered; a second one ends the process at once.

    Signals that the process ignores stay ignored, and in threads other than the main one
    nothing changes, since handlers cannot be set there.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._is_paused = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                before = signal.getsignal(signum)
                if before not in (signal.SIG_IGN, None):  # None: not set from Python
                    self._before[signum] = before
                    signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, before in self._before.items():
            signal.signal(signum, before)
        self._before = {}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While entered the user's own code runs, which SIGINT interrupts as ever."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self._is_paused and signum == signal.SIGINT and callable(self._before[signum]):
            self._before[signum](signum, frame)
            return
        if self.received is not None:
            os._exit(128 + signum)
        self.received = signum
