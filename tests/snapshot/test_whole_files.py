"""A file that takes another's place is the old one or the new one, whatever fails or is killed."""

from __future__ import annotations

import errno
import gc
import os
import signal
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from disks import CountingDisk, FailingDisk, KillingDisk

from tbptt_ckpt.snapshot.disk import Disk, new_file, whole_file

Injected = Callable[..., None]


def write(path: Path, disk: Disk | None = None) -> None:
    with whole_file(path, disk) as file:
        torch.save({"weight": torch.arange(2000)}, file)


@pytest.fixture
def written(tmp_path: Path) -> bytes:
    """What the new file holds when nothing fails."""
    write(tmp_path / "whole")
    return (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_every_failing_call_leaves_the_old_file_or_the_new(
    error: int, written: bytes, tmp_path: Path, injected: Injected
) -> None:
    counter = CountingDisk()
    write(tmp_path / "whole", counter)
    for count in range(1, len(counter.calls) + 1):
        folder = tmp_path / str(count)
        folder.mkdir()
        (folder / "file").write_bytes(b"old")
        disk = FailingDisk(count, error)
        with pytest.raises(OSError, match=os.strerror(error)):  # not what torch makes of it
            write(folder / "file", disk)
        assert disk.fired
        injected("disk full" if error == errno.ENOSPC else "power loss, torn write")
        is_replaced = "replace" in disk.calls[: count - 1]
        assert (folder / "file").read_bytes() == (written if is_replaced else b"old")
        assert [path.name for path in folder.iterdir()] == ["file"]
    assert count > 5


def test_a_kill_at_every_call_leaves_the_old_file_or_the_new(
    written: bytes, tmp_path: Path, injected: Injected
) -> None:
    counter = CountingDisk()
    write(tmp_path / "whole", counter)
    for count in range(1, len(counter.calls) + 1):
        path = tmp_path / str(count)
        path.write_bytes(b"old")
        pid = os.fork()
        if pid == 0:
            try:
                write(path, KillingDisk(count))
            finally:
                os._exit(1)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
        injected("kill -9 during a save")
        is_replaced = "replace" in counter.calls[: count - 1]
        assert path.read_bytes() == (written if is_replaced else b"old")


def test_an_error_of_whoever_writes_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def interrupted() -> None:
        with whole_file(path) as file:
            file.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_what_could_not_be_written_is_not_kept_alive(tmp_path: Path) -> None:
    tensor = torch.zeros(2000)
    gone = weakref.ref(tensor)
    gc.disable()
    try:
        with pytest.raises(OSError, match="No space"), new_file(tmp_path / "file", full()) as file:
            torch.save({"weight": tensor}, file)
        del tensor, file
        assert gone() is None
    finally:
        gc.enable()


def full() -> Disk:
    return FailingDisk(1, errno.ENOSPC, "write")


def test_what_a_link_in_the_way_leads_to_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"other")
    (tmp_path / f".file.{os.getpid()}.part").symlink_to(tmp_path / "other")
    write(tmp_path / "file")
    assert (tmp_path / "other").read_bytes() == b"other"
    assert not (tmp_path / "file").is_symlink()
