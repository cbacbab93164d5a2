"""When a run's snapshots are taken, and what happens when one cannot be."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

from tbptt_ckpt.errors import ArgumentError, SnapshotError
from tbptt_ckpt.snapshot.disk import Disk
from tbptt_ckpt.snapshot.store import Loaded, SnapshotStore, SnapshotWarning
from tbptt_ckpt.trainer.options import Snapshots


class Saving:
    """Saves when it is time.

    Args:
        options: Where, when, how many.
        disk: The system calls.
    """

    def __init__(self, options: Snapshots, disk: Disk | None = None) -> None:
        self.options = options
        self.store = SnapshotStore(Path(options.directory), options.keep, disk)
        self._saved_steps = self._tried_steps = -1
        self._saved_at = time.monotonic()
        self._continues = False

    def load(self) -> Loaded | None:
        """The newest valid snapshot; None where there is none."""
        self.store.clean()
        loaded = self.store.newest_valid()
        self._continues = True
        if loaded is not None:
            self._note_saved(loaded.step)
        return loaded

    def begin(self) -> None:
        """A run begins that continues none.

        Raises:
            ArgumentError: There are snapshots of another run.
        """
        if self._continues:
            return
        if self.store.steps():
            raise ArgumentError(
                f"{self.store.directory} holds snapshots of another run; resume from them, or "
                "name another directory"
            )
        self.store.clean()
        self._continues = True

    def is_due(self, steps: int) -> bool:
        """Whether the options ask for a snapshot after `steps` steps."""
        options = self.options
        if self._tried_steps < 0:
            return True
        if steps == self._tried_steps:
            return False
        every, minutes = options.every_steps, options.every_minutes
        if every is not None and steps // every > self._tried_steps // every:
            return True
        return minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes

    def is_saved(self, steps: int) -> bool:
        """Whether that is the step of the last snapshot."""
        return steps == self._saved_steps

    def save(self, steps: int, state: Any) -> Path | None:
        """Take a snapshot; None where it failed and training shall go on.

        Raises:
            SnapshotError: It failed, and the policy is to stop.
        """
        try:
            path = self.store.save(steps, state)
        except SnapshotError as error:
            if self.options.on_failure == "stop":
                raise
            warnings.warn(f"{error}; going on without it", SnapshotWarning, stacklevel=2)
            self._tried_steps, self._saved_at = steps, time.monotonic()
            return None
        self._note_saved(steps)
        return path

    def _note_saved(self, steps: int) -> None:
        self._saved_steps = self._tried_steps = steps
        self._saved_at = time.monotonic()
