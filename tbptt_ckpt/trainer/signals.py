"""Signals that ask a run to stop: the first is noted, a second ends the process."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


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
    """Notes SIGTERM and SIGINT while entered; a second one ends the process at once.

    Signals that the process ignores stay ignored, and in threads other than the main one
    nothing changes, since handlers cannot be set there.
    """

    def __init__(self) -> None:
        self.received: int | None = None
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

    def _note(self, signum: int, _: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + signum)
        self.received = signum
