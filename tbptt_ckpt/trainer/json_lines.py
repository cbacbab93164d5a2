"""Events as lines of JSON in a file."""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from contextlib import suppress
from dataclasses import asdict
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from tbptt_ckpt.arguments import AnyPath, checked
from tbptt_ckpt.errors import TbpttWarning
from tbptt_ckpt.snapshot.disk import whole_file
from tbptt_ckpt.trainer.events import Notice, UpdateEvent, WindowEvent

_FLUSH_SECONDS = 5.0


class JsonLines:
    """Appends one line per event, `{"event": "window", "steps": ..., ...}`.

    Where the log cannot be written a trainer warns and goes on, and the next event is tried again.

    Args:
        path: The file.

    Raises:
        ArgumentError: Neither a path nor a text.
    """

    @checked
    def __init__(self, path: AnyPath) -> None:
        self.path = Path(path)
        self._file: TextIOWrapper | None = None
        self._flushed = time.monotonic()

    def __repr__(self) -> str:
        return f"JsonLines({str(self.path)!r})"

    def on_window(self, event: WindowEvent) -> None:
        """Write it."""
        self._write("window", asdict(event))

    def on_update(self, event: UpdateEvent) -> None:
        """Write it."""
        self._write("update", asdict(event))

    def on_notice(self, event: Notice) -> None:
        """Write it."""
        self._write("notice", asdict(event))
        self.flush()

    def resume_at(self, steps: int) -> None:
        """Drop the lines of later steps; another file takes this one's place when complete.

        Damaged lines are dropped with a warning; a last one that a kill cut short is no damage.
        """
        self.close()
        self._check_regular()
        if not self.path.exists():
            return
        damaged = 0
        with self.path.open("rb") as old, whole_file(self.path) as new:
            for line in old:
                at = _steps_of(line)
                damaged += math.isinf(at) and line.endswith(b"\n")
                if at <= steps:
                    new.write(line)
        if damaged:
            self._warn(f"{damaged} damaged lines of the log {self.path} were dropped")

    def flush(self) -> None:
        """Hand the lines to the system."""
        self._flushed = time.monotonic()
        if self._file is not None:
            try:
                self._file.flush()
            except OSError:
                self._forget()
                raise

    def close(self) -> None:
        """Close the file; a later event opens it again."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _write(self, kind: str, fields: dict[str, Any]) -> None:
        if self._file is not None and not self._is_there(self._file):
            self._forget()
            self._warn(f"the log {self.path} was removed or replaced; it goes on in a new file")
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._check_regular()
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            self._file = os.fdopen(os.open(self.path, flags, 0o666), "a", encoding="utf-8")
        try:
            line = {"event": kind, **_finite(fields)}
            self._file.write(json.dumps(line, default=str) + "\n")
        except OSError:
            self._forget()
            raise
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def _is_there(self, file: TextIOWrapper) -> bool:
        with suppress(OSError):
            return os.path.samestat(self.path.lstat(), os.fstat(file.fileno()))
        return False

    def _check_regular(self) -> None:
        # For a pipe one would wait for ever, and a link may lead to any file there is.
        if self.path.is_symlink() or (self.path.exists() and not self.path.is_file()):
            raise OSError(f"{self.path} is not a regular file")

    def _forget(self) -> None:
        """What could not be written is lost; closing would try to write it once more."""
        with suppress(OSError):
            self.close()

    def _warn(self, message: str) -> None:
        warnings.warn(message, TbpttWarning, stacklevel=5)


def _finite(fields: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity; they are written as strings."""
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in fields.items()
    }


def _steps_of(line: bytes) -> float:
    """The steps of a line; one that a kill cut short, or that was damaged, counts as too late."""
    try:
        return float(json.loads(line)["steps"])
    except Exception:
        return math.inf
