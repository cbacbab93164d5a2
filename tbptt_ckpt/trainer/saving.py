"""When a run's snapshots are taken, and what happens when one cannot be."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tbptt_ckpt.errors import ArgumentError, SnapshotError
from tbptt_ckpt.snapshot.disk import Disk
from tbptt_ckpt.snapshot.manifest import FileEntry
from tbptt_ckpt.snapshot.reading import Loaded
from tbptt_ckpt.snapshot.store import SnapshotStore, SnapshotWarning
from tbptt_ckpt.snapshot.writing import Beside
from tbptt_ckpt.trainer.events import EventSink
from tbptt_ckpt.trainer.json_lines import JsonLines
from tbptt_ckpt.trainer.learning_state import COPIED
from tbptt_ckpt.trainer.options import Snapshots
from tbptt_ckpt.trainer.rank_states import by_first, joint_state, led_by_first, on_all
from tbptt_ckpt.trainer.sharded_state import Tensors, without_shards
from tbptt_ckpt.updates.ranks import RankGroup

LOG = "events.jsonl"
EVERYTHING: tuple[tuple[str, ...], ...] = ((),)


class Saving:
    """Saves when it is time.

    Attributes:
        sinks: The log, beside the snapshots.
    """

    def __init__(
        self, options: Snapshots, disk: Disk | None = None, ranks: RankGroup | None = None
    ) -> None:
        self._options, self._ranks = options, ranks
        self._is_first = ranks is None or ranks.rank == 0  # who writes
        copied = COPIED if ranks is None else EVERYTHING  # which is the first rank's
        self._store = SnapshotStore(Path(options.directory), options.keep, disk, copied)
        self._saved_steps = self._tried_steps = -1
        self._saved_at = time.monotonic()
        self._continues = False
        log: tuple[EventSink, ...] = (JsonLines(self._store.directory / LOG),)
        self.sinks = log if self._is_first else ()

    def __str__(self) -> str:
        return f", snapshots in {self._store.directory}"

    def check(self, call: str) -> None:
        """There are snapshots, so that the call can do what it says."""

    def load(self, use: Callable[[Loaded], None]) -> Loaded | None:
        """The newest valid snapshot that can be used; None where there is none."""
        try:
            loaded = self._newest(use)
        except BaseException:
            self._store.close()
            raise
        self._continues = True
        if loaded is not None:
            self._note_saved(loaded.step)
        return loaded

    def _newest(self, use: Callable[[Loaded], None]) -> Loaded | None:
        """The newest valid one that can be used, on all ranks; the first of them finds it."""
        found: dict[int, Loaded] = {}

        def use_on_all(step: int) -> None:
            with on_all(self._ranks):
                if step not in found:
                    found.clear()
                    found[step] = self._store.load(step)
            use(found[step])

        def find(lead: Callable[[int], None]) -> int | None:
            self._store.lock(makes=False)
            self._store.clean()

            def use_found(loaded: Loaded) -> None:
                found.clear()
                found[loaded.step] = loaded
                lead(loaded.step)

            loaded = self._store.newest_valid(use_found)
            return None if loaded is None else loaded.step

        step = led_by_first(self._ranks, find, use_on_all)
        return None if step is None else found[step]

    def begin(self) -> None:
        """A run begins that continues none.

        Raises:
            ArgumentError: There are snapshots of another run.
            SnapshotError: Another trainer writes them.
        """
        by_first(self._ranks, self._begin)
        self._continues = True

    def _begin(self) -> None:
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

        Ranks that train together all call it, and the first one writes what all have.

        Raises:
            SnapshotError: It failed, and the policy is to stop.
        """
        state, shards = state_dict(), Tensors()
        if self._ranks is not None:
            state, shards = without_shards(state)
            state = joint_state(self._ranks, state)

        def write(lead: Beside) -> Path | None:
            return self._write(steps, state, lead if shards else lambda _: ())

        path = led_by_first(self._ranks, write, partial(self._write_shards, shards))
        if path is None:
            self.put_off(steps)
        else:
            self._note_saved(steps)
        return path

    def _write_shards(self, shards: Tensors, folder: Path) -> list[FileEntry]:
        """Every rank writes its own; the first one is told of all files."""
        from tbptt_ckpt.snapshot.shards import write_shards

        assert self._ranks is not None, "they have shards"
        write = partial(write_shards, folder, shards, self._ranks.rank)
        with on_all(self._ranks):
            own = self._ranks.together(write)
        return [entry for entries in self._ranks.exchange(own) for entry in entries]

    def _write(self, steps: int, state: Any, beside: Beside) -> Path | None:
        if self._saved_steps >= 0 and not self._store.path(self._saved_steps).exists():
            warnings.warn(
                f"{self._store.path(self._saved_steps)} has disappeared since it was saved; the "
                "next one is written all the same",
                SnapshotWarning,
                stacklevel=2,
            )
        try:
            return self._store.save(steps, state, beside)
        except SnapshotError as error:
            if self._options.on_failure == "stop":
                raise
            warnings.warn(f"{error}; going on without it", SnapshotWarning, stacklevel=2)
            return None

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
