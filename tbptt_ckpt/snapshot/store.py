"""A directory of snapshots: saving, keeping the newest few, finding the newest valid one."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

from tbptt_ckpt.arguments import AnyPath, PositiveInt, checked
from tbptt_ckpt.errors import ArgumentError, SnapshotError, TbpttWarning
from tbptt_ckpt.module.trees import iterate_tensors
from tbptt_ckpt.snapshot.disk import Disk
from tbptt_ckpt.snapshot.lock import DirectoryLock
from tbptt_ckpt.snapshot.plain import to_plain
from tbptt_ckpt.snapshot.reading import Loaded, load_state, read_manifest, verify_files
from tbptt_ckpt.snapshot.writing import Beside, write_files

_NAME = re.compile(r"step-(0|[1-9][0-9]*)")
_TEMPORARY = re.compile(r"\.(step-[0-9]+)\.(part|old|replaced)")


class SnapshotWarning(TbpttWarning):
    """A snapshot was passed over, or something about the directory needs attention."""


@dataclass(frozen=True, slots=True)
class SnapshotReport:
    """What verifying one snapshot found.

    Attributes:
        step: Steps trained.
        path: Its directory.
        created: When it was taken; None where that cannot be read.
        num_bytes: Bytes of its files.
        problem: What is wrong with it; None if every byte is as it was written.
    """

    step: int
    path: Path
    created: str | None
    num_bytes: int
    problem: str | None


class SnapshotStore:
    """The snapshots of one run, `step-N/` in one directory; one process writes it at a time.

    Args:
        directory: Where they are; made by the first save.
        keep: How many of the newest valid ones stay after a save.
        disk: The system calls.
        copied: What of a loaded state stays on the host; see `load_state`.
    """

    @checked
    def __init__(
        self,
        directory: AnyPath,
        keep: PositiveInt = 3,
        disk: Disk | None = None,
        copied: Sequence[tuple[str, ...]] = (),
    ) -> None:
        directory = Path(directory)
        self.directory, self.keep, self._disk = directory, keep, disk or Disk()
        self._copied = copied
        self._lock = DirectoryLock(directory)
        self._removing: Thread | None = None
        self._removal_problem: str | None = None
        if directory.exists() and not directory.is_dir():
            raise ArgumentError(f"the snapshot directory {directory} is a file")

    def lock(self, *, makes: bool) -> None:
        """Be the only one to write until `close`; a directory that is not there is made, or left.

        Raises:
            SnapshotError: Another trainer writes it.
        """
        if makes:
            with contextlib.suppress(OSError):  # the first save says so
                self._make_directory()
        self._lock.acquire()

    def close(self) -> None:
        """Wait until old snapshots are removed, and let others write."""
        self.wait()
        self._lock.release()

    def path(self, step: int) -> Path:
        """Where the snapshot of that step is, or would be."""
        return self.directory / f"step-{step}"

    def steps(self) -> list[int]:
        """The steps of all snapshots in order, whatever state they are in."""
        found = (_NAME.fullmatch(name) for name in self._names())
        return sorted(int(match[1]) for match in found if match)

    def save(self, step: int, state: Any, beside: Beside = lambda _: ()) -> Path:
        """Write a snapshot; until it is complete the ones before are all there is.

        Nothing is copied but tensors that are not on the CPU, or are views of larger ones.
        `beside` writes more files, which are synced, and says what they hold.

        Raises:
            SnapshotError: It could not be written; no part of it stays.
        """
        self.wait()
        plain = to_plain(state, "the snapshot")
        part = self.directory / f".step-{step}.part"
        try:
            self._make_directory()
            if part.exists():
                self._remove(part)
            write_files(self._disk, part, step, plain, beside)
            self._commit(part, step)
        except BaseException as error:
            self._discard(part)
            if isinstance(error, OSError):
                raise self._failure(step, plain, error) from error
            raise
        self._retire()
        return self.path(step)

    def keep_only(self, step: int) -> None:
        """Remove all snapshots but that of one step."""
        self.wait()
        self._remove_steps([other for other in self.steps() if other != step])

    def newest_valid(self, use: Callable[[Loaded], None] = lambda _: None) -> Loaded | None:
        """The newest snapshot whose every byte is as written; None if there is none at all.

        Warns loudly of every newer one that had to be passed over, those for which `use` raised
        `SnapshotError` among them.

        Raises:
            SnapshotError: There are snapshots, and none is valid.
        """
        problems = []
        for step in reversed(self.steps()):
            try:
                loaded = self.load(step, use)
            except SnapshotError as error:
                problems.append(str(error))
                continue
            for problem in problems:
                message = f"SNAPSHOT PASSED OVER: {problem}; falling back to {loaded.path}"
                warnings.warn(message, SnapshotWarning, stacklevel=2)
            return loaded
        if problems:
            raise SnapshotError(
                f"none of the {len(problems)} snapshots in {self.directory} can be used: "
                + "; ".join(problems)
            )
        return None

    def load(self, step: int, use: Callable[[Loaded], None] = lambda _: None) -> Loaded:
        """Verify and read one snapshot, and use it.

        Raises:
            SnapshotError: It is not as it was written.
        """
        path = self.path(step)
        try:
            manifest = verify_files(path)
            loaded = Loaded(step, path, manifest, load_state(path, self._copied))
            use(loaded)
        except SnapshotError as error:
            raise SnapshotError(f"{path}: {error}") from error
        return loaded

    def reports(self) -> Iterator[SnapshotReport]:
        """Every snapshot from the oldest, verified; nothing is deserialised."""
        for step in self.steps():
            path = self.path(step)
            try:
                manifest = verify_files(path)
            except SnapshotError as error:
                yield SnapshotReport(step, path, None, _size(path), str(error))
            else:
                yield SnapshotReport(step, path, manifest.created, manifest.num_bytes, None)

    def clean(self) -> None:
        """Remove what killed saves left, and finish a replacement that was cut short."""
        for match in filter(None, map(_TEMPORARY.fullmatch, self._names())):
            path, target = self.directory / match[0], self.directory / match[1]
            if match[2] == "replaced" and not target.exists():
                self._disk.replace(path, target)
            else:
                self._discard(path)

    def _make_directory(self) -> None:
        missing = [p for p in (self.directory, *self.directory.parents) if not p.exists()]
        for directory in reversed(missing):
            self._disk.make_directory(directory)
            self._disk.sync_directory(directory.parent)

    def _commit(self, part: Path, step: int) -> None:
        """The rename makes the snapshot; another of the same step stands aside meanwhile."""
        target = self.path(step)
        aside = self.directory / f".step-{step}.replaced"
        replaces = target.exists()
        if replaces:
            self._disk.replace(target, aside)
        try:
            self._disk.replace(part, target)
        except OSError:
            if replaces:
                self._disk.replace(aside, target)
            raise
        self._disk.sync_directory(self.directory)
        if replaces:
            self._discard(aside)

    def wait(self) -> None:
        """Wait until old snapshots are removed, and warn if one could not be."""
        if self._removing is not None:
            self._removing.join()
            self._removing = None
        if self._removal_problem is not None:
            warnings.warn(self._removal_problem, SnapshotWarning, stacklevel=2)
            self._removal_problem = None

    def _retire(self) -> None:
        """Remove the oldest snapshots beyond `keep`; those that look broken are not counted.

        Freeing a large file takes about as long as writing it, so training does not wait.
        """
        whole = [step for step in self.steps() if _looks_whole(self.path(step))]
        kept = whole[-self.keep :]
        old = [step for step in self.steps() if step < kept[0]] if kept else []
        if old:
            removing = Thread(target=self._remove_steps, args=(old,), name="tbptt-retire")
            try:
                removing.start()
            except RuntimeError:  # there can be no thread any more
                self._remove_steps(old)
            else:
                self._removing = removing

    def _remove_steps(self, steps: list[int]) -> None:
        for step in steps:
            old = self.directory / f".step-{step}.old"
            try:
                self._disk.replace(self.path(step), old)  # never seen half removed
                self._remove(old)
            except OSError as error:
                self._removal_problem = (
                    f"the old snapshot {self.path(step)} cannot be removed: {error}"
                )

    def _discard(self, path: Path) -> None:
        with contextlib.suppress(OSError):
            self._remove(path)

    def _remove(self, path: Path) -> None:
        if not path.is_dir():
            with contextlib.suppress(FileNotFoundError):
                self._disk.unlink(path)
            return
        for child in path.iterdir():
            self._remove(child)
        self._disk.remove_directory(path)

    def _names(self) -> list[str]:
        return sorted(os.listdir(self.directory)) if self.directory.is_dir() else []  # noqa: PTH208

    def _failure(self, step: int, plain: Any, error: OSError) -> SnapshotError:
        num_bytes = sum(tensor.nbytes for tensor in iterate_tensors(plain))
        try:
            free = f", {shutil.disk_usage(self.directory).free:,} are free"
        except OSError:
            free = ""
        others = self.steps()
        intact = f"; {self.path(others[-1])} is intact" if others else ""
        return SnapshotError(
            f"{self.path(step)} cannot be written: {error.strerror or error} (the state has "
            f"{num_bytes:,} bytes{free}){intact}"
        )


def _looks_whole(path: Path) -> bool:
    try:
        read_manifest(path)
    except SnapshotError:
        return False
    return True


def _size(path: Path) -> int:
    if not path.is_dir():
        return 0
    return sum(file.stat().st_size for file in path.iterdir() if file.is_file())
