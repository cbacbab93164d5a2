"""When a run's snapshots are taken, and what happens when one cannot be."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tbptt_ckpt.errors import ArgumentError, SnapshotError
from tbptt_ckpt.snapshot.disk import Disk
from tbptt_ckpt.snapshot.reading import Loaded
from tbptt_ckpt.snapshot.store import SnapshotStore, SnapshotWarning
from tbptt_ckpt.trainer.events import EventSink
from tbptt_ckpt.trainer.json_lines import JsonLines
from tbptt_ckpt.trainer.learning_state import COPIED
from tbptt_ckpt.trainer.options import Snapshots
from tbptt_ckpt.updates.ranks import RankGroup

LOG = "events.jsonl"


class Saving:
    """Saves when it is time.

    Attributes:
        sinks: The log, beside the snapshots.
    """

    def __init__(
        self, options: Snapshots, disk: Disk | None = None, ranks: RankGroup | None = None
    ) -> None:
        self._options, self._ranks = options, ranks
        directory = _directory_of(ranks, Path(options.directory))
        self._store = SnapshotStore(directory, options.keep, disk, COPIED)
        self._saved_steps = self._tried_steps = -1
        self._saved_at = time.monotonic()
        self._continues = False
        self.sinks: tuple[EventSink, ...] = (JsonLines(self._store.directory / LOG),)

    def __str__(self) -> str:
        return f", snapshots in {self._store.directory}"

    def check(self, call: str) -> None:
        """There are snapshots, so that the call can do what it says."""

    def load(self, use: Callable[[Loaded], None]) -> Loaded | None:
        """The newest valid snapshot that can be used; None where there is none."""
        self._store.lock(makes=False)
        try:
            self._store.clean()
            loaded = self._newest(use)
        except BaseException:
            self._store.close()
            raise
        self._continues = True
        if loaded is not None:
            self._note_saved(loaded.step)
        return loaded

    def _newest(self, use: Callable[[Loaded], None]) -> Loaded | None:
        """The newest one that is valid, on all ranks that train together."""
        if self._ranks is None:
            return self._store.newest_valid(use)
        valid = [each.step for each in self._store.reports() if each.problem is None]
        step = self._ranks.newest_common(valid)
        return None if step is None else self._store.load(step, use)

    def begin(self) -> None:
        """A run begins that continues none.

        Raises:
            ArgumentError: There are snapshots of another run.
            SnapshotError: Another trainer writes them.
        """
        if self._ranks is not None:
            with suppress(OSError):  # which saving says
                self._store.directory.parent.mkdir(parents=True, exist_ok=True)  # or another rank
        self._store.lock(makes=True)
        if self._continues:
            return
        if self._store.steps():
            self._store.close()
            raise ArgumentError(
                f"{self._store.directory} holds snapshots of another run; resume from them, or "
                "name another directory"
            )
        self._store.clean()
        self._continues = True

    def is_due(self, steps: int) -> bool:
        """Whether the options ask for a snapshot after `steps` steps."""
        options = self._options
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

    def save(self, steps: int, state_dict: Callable[[], Any]) -> Path | None:
        """Take a snapshot; None where it failed and training shall go on.

        Raises:
            SnapshotError: It failed, and the policy is to stop.
        """
        state = state_dict()
        if self._saved_steps >= 0 and not self._store.path(self._saved_steps).exists():
            warnings.warn(
                f"{self._store.path(self._saved_steps)} has disappeared since it was saved; the "
                "next one is written all the same",
                SnapshotWarning,
                stacklevel=2,
            )
        try:
            path = self._store.save(steps, state)
        except SnapshotError as error:
            if self._options.on_failure == "stop":
                raise
            warnings.warn(f"{error}; going on without it", SnapshotWarning, stacklevel=2)
            self.put_off(steps)
            return None
        self._note_saved(steps)
        return path

    def put_off(self, steps: int) -> None:
        """None is taken after so many steps; the next one comes when it is due."""
        self._tried_steps, self._saved_at = steps, time.monotonic()

    def close(self) -> None:
        """Nothing is written for now."""
        self._store.close()

    def stop_message(self, word: str, steps: int) -> str:
        """What to tell who stopped the run."""
        return f"{word} after {steps} steps; resume from {self._store.directory}"

    def _note_saved(self, steps: int) -> None:
        self._saved_steps = steps
        self.put_off(steps)


def _directory_of(ranks: RankGroup | None, directory: Path) -> Path:
    """Where the snapshots of a run are, or of one of its ranks.

    Raises:
        ArgumentError: Those of another number of ranks are there.
    """
    found, this_run = {path.name for path in directory.glob("rank-*-of-*")}, "is of one process"
    if ranks is not None:
        found |= {path.name for path in directory.glob("step-*")}
        found = {name for name in found if not name.endswith(f"-of-{ranks.count}")}
        this_run = f"has {ranks.count} ranks, each with lanes of its own"
    if found:
        raise ArgumentError(
            f"{directory} holds {min(found)}, and this run {this_run}; go on with as many ranks as "
            "wrote it, or name another directory"
        )
    return directory if ranks is None else directory / f"rank-{ranks.rank}-of-{ranks.count}"


class NoSnapshots(Saving):
    """Saves nothing, where no snapshots were asked for."""

    sinks = ()

    def __init__(self) -> None:
        """It has no directory."""

    def __str__(self) -> str:
        return ""

    def check(self, call: str) -> None:
        """Raise `ArgumentError`."""
        raise ArgumentError(f"{call} needs snapshots=Snapshots(directory=...)")

    def begin(self) -> None:
        """Any run may begin."""

    def is_due(self, steps: int) -> bool:
        """Never."""
        return False

    def is_saved(self, steps: int) -> bool:
        """As well as it ever will be."""
        return True

    def save(self, steps: int, state_dict: Callable[[], Any]) -> Path | None:
        """Save nothing."""
        return None

    def close(self) -> None:
        """Nothing is open."""

    def stop_message(self, word: str, steps: int) -> str:
        """What to tell who stopped the run."""
        return word
