"""One trainer at a time writes a directory, and a dead process holds nothing."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from training_jobs import Job, with_snapshots

from tbptt_ckpt import ArgumentError, SnapshotError, TbpttWarning
from tbptt_ckpt.snapshot.lock import DirectoryLock


@contextmanager
def child(work: Callable[[], Any]) -> Iterator[int]:
    """A process that has done its work and lives on, until it is killed."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os.write(writer, b"1")
            time.sleep(60)
        finally:
            os._exit(1)
    os.close(writer)
    try:
        assert os.read(reader, 1) == b"1"
        yield pid
    finally:
        os.close(reader)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    with_snapshots(Job(), tmp_path)[0].train()

    def go_on() -> None:
        trainer, _, _ = with_snapshots(Job(), tmp_path)
        go_on.trainer = trainer  # type: ignore[attr-defined] - it lives on
        assert trainer.resume()

    with child(go_on) as pid:
        trainer, _, _ = with_snapshots(Job(), tmp_path)
        words = f"another trainer writes {re.escape(str(tmp_path))}: process {pid} on"
        with pytest.raises(SnapshotError, match=words):
            trainer.resume()
        with pytest.raises(SnapshotError, match=words):
            trainer.train()
    assert trainer.resume()
    trainer.train()


def test_a_second_trainer_of_this_process_is_refused_while_the_first_runs(tmp_path: Path) -> None:
    first, _, _ = with_snapshots(Job(), tmp_path)
    second, _, _ = with_snapshots(Job(), tmp_path)
    windows = first.windows()
    next(windows)
    with pytest.raises(SnapshotError, match=f"process {os.getpid()} on"):
        second.resume()
    windows.close()
    assert second.resume()
    with pytest.raises(SnapshotError, match="another trainer"):
        next(first.windows())
    second.train()
    first.resume()
    first.train()


def test_a_refused_trainer_holds_nothing(tmp_path: Path) -> None:
    with_snapshots(Job(), tmp_path)[0].train()
    fresh, _, _ = with_snapshots(Job(), tmp_path)
    with pytest.raises(ArgumentError, match="snapshots of another run"):
        fresh.train()
    other, _, _ = with_snapshots(Job(k2=5), tmp_path)
    with pytest.raises(ArgumentError, match="k2"):
        other.resume()
    last, _, _ = with_snapshots(Job(), tmp_path)
    assert last.resume()
    last.train()


def test_a_forgotten_trainer_holds_nothing(tmp_path: Path) -> None:
    lock = DirectoryLock(tmp_path)
    lock.acquire()
    with pytest.raises(SnapshotError):
        DirectoryLock(tmp_path).acquire()
    del lock
    DirectoryLock(tmp_path).acquire()


def test_a_worker_holds_nothing_of_its_parent(tmp_path: Path) -> None:
    lock, other = DirectoryLock(tmp_path), DirectoryLock(tmp_path)
    lock.acquire()
    with child(lambda: None):
        with pytest.raises(SnapshotError):
            other.acquire()
        lock.release()
        other.acquire()
    other.release()


def test_where_nothing_can_be_locked_a_warning_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(TbpttWarning, match=r"cannot be locked \(.*No locks available\)"):
        DirectoryLock(tmp_path).acquire()
