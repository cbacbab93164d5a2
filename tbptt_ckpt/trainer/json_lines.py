"""Events as lines of JSON in a file."""

from __future__ import annotations

import json
import math
import time
import warnings
from dataclasses import asdict
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from tbptt_ckpt.errors import TbpttWarning
from tbptt_ckpt.snapshot.disk import whole_file
from tbptt_ckpt.trainer.events import Notice, UpdateEvent, WindowEvent

_FLUSH_SECONDS = 5.0


class JsonLines:
    """Appends one line per event, `{"event": "window", "steps": ..., ...}`.

    A log that cannot be written warns once and stops; training goes on.

    Args:
        path: The file.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._file: TextIOWrapper | None = None
        self._flushed = time.monotonic()
        self._failed = False

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
        """Drop the lines of later steps; another file takes this one's place when complete."""
        self.close()
        if not self.path.is_file():
            if self.path.exists():  # perhaps a pipe, for which one would wait for ever
                self._fail(OSError("it is not a regular file"))
            return
        try:
            with self.path.open("rb") as old, whole_file(self.path) as new:
                for line in old:
                    if _steps_of(line) <= steps:
                        new.write(line)
        except OSError as error:
            self._fail(error)

    def flush(self) -> None:
        """Hand the lines to the system."""
        if self._file is not None:
            try:
                self._file.flush()
            except OSError as error:
                self._fail(error)
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Close the file; a later event opens it again."""
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError as error:
                self._fail(error)

    def _write(self, kind: str, fields: dict[str, Any]) -> None:
        if self._failed:
            return
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("a", encoding="utf-8")
            self._file.write(json.dumps({"event": kind, **_finite(fields)}) + "\n")
        except OSError as error:
            self._fail(error)
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def _fail(self, error: OSError) -> None:
        if not self._failed:
            self._failed = True
            warnings.warn(
                f"the log {self.path} cannot be written, so it ends here: {error}",
                TbpttWarning,
                stacklevel=3,
            )


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
