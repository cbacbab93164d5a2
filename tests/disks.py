"""Disks that fail, that kill, and one that knows what a loss of power leaves."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tbptt_ckpt.snapshot.disk import Disk

CALLS = (
    *("make_directory", "create", "write", "sync", "close"),
    *("sync_directory", "replace", "unlink", "remove_directory"),
)


class HastyDisk(Disk):
    """Does not wait for the medium, for tests that lose no power."""

    def sync(self, descriptor: int) -> None:
        """Do not wait."""

    def sync_directory(self, path: Path) -> None:
        """Do not wait."""


def _intercepted(name: str) -> Any:
    def call(self: CountingDisk, *args: Any) -> Any:
        self.calls.append(name)
        if self.is_due(name):
            return self.strike(name, args)
        return getattr(HastyDisk, name)(self, *args)

    return call


class CountingDisk(HastyDisk):
    """Strikes at one call, counted over all of them or over those of one kind.

    Args:
        at: Which call, from 1; 0 never strikes.
        kind: Count only calls of this name.
    """

    def __init__(self, at: int = 0, kind: str | None = None) -> None:
        self.at, self.kind = at, kind
        self.calls: list[str] = []
        self.fired = False

    def is_due(self, name: str) -> bool:
        if self.kind is not None and name != self.kind:
            return False
        count = len(self.calls) if self.kind is None else self.calls.count(self.kind)
        return count == self.at

    def strike(self, name: str, args: tuple[Any, ...]) -> Any:
        raise NotImplementedError


for _name in CALLS:
    setattr(CountingDisk, _name, _intercepted(_name))


class FailingDisk(CountingDisk):
    """One call fails with an error of the system; a write fails half done."""

    def __init__(self, at: int, error: int, kind: str | None = None) -> None:
        super().__init__(at, kind)
        self.error = error

    def strike(self, name: str, args: tuple[Any, ...]) -> Any:
        self.fired = True
        if name == "write":
            descriptor, data = args
            os.write(descriptor, data[: len(data) // 2])
        if name == "close":
            os.close(*args)
        raise OSError(self.error, os.strerror(self.error))


class KillingDisk(CountingDisk):
    """The process is killed at one call, half-way through it if it is a write."""

    def strike(self, name: str, args: tuple[Any, ...]) -> Any:
        if name == "write":
            descriptor, data = args
            os.write(descriptor, data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Operation:
    """One change, with what it changes: a file's bytes or a directory's names."""

    name: str
    target: Any  # a file's key, or a path
    data: Any = None

    @property
    def directory(self) -> Path:
        """Whose names it changes."""
        path: Path = self.data[0] if self.name == "create" else self.target
        return path.parent


class JournalDisk(Disk):
    """Does as it is told and writes it down."""

    def __init__(self) -> None:
        self.journal: list[Operation] = []
        self._keys: dict[int, int] = {}
        self._count = 0

    def make_directory(self, path: Path) -> None:
        super().make_directory(path)
        self.journal.append(Operation("make_directory", path))

    def create(self, path: Path) -> int:
        descriptor = super().create(path)
        self._count += 1
        self._keys[descriptor] = self._count
        self.journal.append(Operation("create", self._count, (path,)))
        return descriptor

    def write(self, descriptor: int, data: memoryview) -> int:
        written = super().write(descriptor, data)
        self.journal.append(Operation("write", self._keys[descriptor], bytes(data[:written])))
        return written

    def sync(self, descriptor: int) -> None:
        self.journal.append(Operation("sync", self._keys[descriptor]))

    def sync_directory(self, path: Path) -> None:
        self.journal.append(Operation("sync_directory", path))

    def replace(self, source: Path, target: Path) -> None:
        super().replace(source, target)
        self.journal.append(Operation("replace", source, target))

    def unlink(self, path: Path) -> None:
        super().unlink(path)
        self.journal.append(Operation("unlink", path))

    def remove_directory(self, path: Path) -> None:
        super().remove_directory(path)
        self.journal.append(Operation("remove_directory", path))


def survivors(journal: list[Operation]) -> Iterator[tuple[list[Operation], bool]]:
    """What may have reached the medium when the power fails during or after a journal.

    For every prefix: the operations that were synced, with every prefix of those that were
    not; also each lone one that was not, since the order among them is not promised; the last
    write torn in half as well. The flag says whether the journal was complete.
    """
    for length in range(len(journal) + 1):
        prefix = journal[:length]
        pending = [i for i, _ in enumerate(prefix) if not _is_synced(prefix, i)]
        kept = [set(pending[:count]) for count in range(len(pending) + 1)]
        kept += [{index} for index in pending[1:]]
        durable = set(range(length)) - set(pending)
        for some in kept:
            chosen = [prefix[i] for i in sorted(durable | some)]
            yield chosen, length == len(journal)
            if some and (last := prefix[max(some)]).name == "write":
                torn = Operation("write", last.target, last.data[: len(last.data) // 2])
                yield [torn if op is last else op for op in chosen], False


def _is_synced(prefix: list[Operation], index: int) -> bool:
    operation = prefix[index]
    later = prefix[index + 1 :]
    if operation.name in ("sync", "sync_directory"):
        return True
    if operation.name == "write":
        return any(op.name == "sync" and op.target == operation.target for op in later)
    return any(op.name == "sync_directory" and op.target == operation.directory for op in later)


def surviving_tree(
    base: dict[Path, bytes | None], operations: list[Operation]
) -> dict[Path, bytes | None]:
    """What the medium holds: `base` changed by some operations; None stands for a directory."""
    tree = dict(base)
    files: dict[int, bytearray] = {}
    places: dict[int, Path] = {}
    for op in operations:
        if op.name == "make_directory":
            tree[op.target] = None
        elif op.name == "create" and op.directory in tree:
            files[op.target], places[op.target] = bytearray(), op.data[0]
            tree[op.data[0]] = b""
        elif op.name == "write" and op.target in files:
            files[op.target] += op.data
        elif op.name == "replace" and op.target in tree:
            _move(tree, places, op.target, op.data)
        elif op.name in ("unlink", "remove_directory"):
            tree.pop(op.target, None)
    for key, path in places.items():
        if path in tree:
            tree[path] = bytes(files[key])
    return {path: tree[path] for path in tree if _is_reachable(path, tree)}


def _is_reachable(path: Path, tree: dict[Path, bytes | None]) -> bool:
    """Whether its directories exist, up to the first that was not journalled."""
    above = {parent for parent in tree if tree[parent] is None}
    root = min(above, key=lambda p: len(p.parts))
    return all(parent in above for parent in path.parents if root in (parent, *parent.parents))


def write_tree(tree: dict[Path, bytes | None], old_root: Path, root: Path) -> None:
    """Make that directory at `root`."""
    for path in sorted(tree):
        content, place = tree[path], root / path.relative_to(old_root)
        if content is None:
            place.mkdir(parents=True, exist_ok=True)
        else:
            place.write_bytes(content)


def _move(
    tree: dict[Path, bytes | None], places: dict[int, Path], source: Path, target: Path
) -> None:
    def moved(path: Path) -> Path:
        return target / path.relative_to(source)

    for path in [p for p in tree if p == source or source in p.parents]:
        tree[moved(path)] = tree.pop(path)
    for key, path in places.items():
        if path == source or source in path.parents:
            places[key] = moved(path)


def contents(root: Path) -> dict[Path, bytes | None]:
    """Everything below a directory, itself included."""
    return {root: None} | {
        path: None if path.is_dir() else path.read_bytes() for path in root.rglob("*")
    }
