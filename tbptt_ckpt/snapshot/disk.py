"""Files written whole or not at all, by system calls that a test can fail one by one."""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_WRITE_BYTES = 16 << 20


class Disk:
    """Changes files by single system calls; every one raises `OSError` where it fails.

    NOTE [What survives a power loss]
    What was written to a file survives once the file was synced; that a name exists, or
    was replaced, survives once its directory was synced. Nothing else is relied upon.
    """

    def make_directory(self, path: Path) -> None:
        """Make one directory; its parent must exist."""
        os.mkdir(path)  # noqa: PTH102 - one system call

    def create(self, path: Path) -> int:
        """Make a new file, never one that a link names, and return its descriptor."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(path, flags, 0o666)

    def write(self, descriptor: int, data: memoryview) -> int:
        """Write some of `data` and return how many bytes that was."""
        return os.write(descriptor, data)

    def sync(self, descriptor: int) -> None:
        """Wait until the file's bytes are on the medium."""
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        """Close a file."""
        os.close(descriptor)

    def sync_directory(self, path: Path) -> None:
        """Wait until the directory's names are on the medium."""
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def replace(self, source: Path, target: Path) -> None:
        """Give a file or directory another name, in one indivisible step."""
        os.replace(source, target)  # noqa: PTH105 - one system call

    def unlink(self, path: Path) -> None:
        """Remove a file."""
        os.unlink(path)  # noqa: PTH108 - one system call

    def remove_directory(self, path: Path) -> None:
        """Remove an empty directory."""
        os.rmdir(path)  # noqa: PTH106 - one system call


class NewFile:
    """A file that is being written, as `torch.save` takes one.

    Attributes:
        num_bytes: Bytes written.
    """

    def __init__(self, disk: Disk, descriptor: int) -> None:
        self._disk, self._descriptor = disk, descriptor
        self.num_bytes = 0
        # Of the first error; the error itself would keep alive all that was being written.
        self._failure: tuple[int | None, str | None] | None = None

    def write(self, data: Any) -> int:
        """Write all of it."""
        self.raise_failure()  # torch goes on to write the end of the archive
        view = memoryview(data).cast("B")
        rest = view
        try:
            while len(rest):
                rest = rest[self._disk.write(self._descriptor, rest[:_WRITE_BYTES]) :]
        except OSError as error:
            self._failure = error.errno, error.strerror
            raise
        self.num_bytes += len(view)
        return len(view)

    def flush(self) -> None:
        """Nothing is held back."""

    def raise_failure(self, hidden: BaseException | None = None) -> None:
        """Raise the first error of `write` again, if there was one.

        The error that hides it is its context; what was written is not kept alive by that.
        """
        if self._failure is None:
            return
        while hidden is not None:
            traceback.clear_frames(hidden.__traceback__)
            hidden = hidden.__context__
        raise OSError(*self._failure) from None


@contextmanager
def new_file(path: Path, disk: Disk) -> Iterator[NewFile]:
    """A file that is not there yet; its bytes are on the medium when the context ends.

    Raises:
        OSError: The first system call that failed; `torch.save` hides it behind another error.
    """
    descriptor = disk.create(path)
    file = NewFile(disk, descriptor)
    try:
        yield file
        disk.sync(descriptor)
    except BaseException as error:
        with contextlib.suppress(OSError):
            disk.close(descriptor)
        if isinstance(error, Exception):
            file.raise_failure(error)
        raise
    disk.close(descriptor)


@contextmanager
def whole_file(path: Path, disk: Disk | None = None) -> Iterator[NewFile]:
    """A file that takes the place of `path` when the context ends, whole and on the medium.

    It is written beside `path`. Whatever fails or is killed before, `path` is as it was.

    Raises:
        OSError: The first system call that failed.
    """
    disk = disk or Disk()
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with contextlib.suppress(FileNotFoundError):
            disk.unlink(part)  # of a process of the same number, which was killed
        with new_file(part, disk) as file:
            yield file
        disk.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            disk.unlink(part)
        raise
    disk.sync_directory(path.parent)
