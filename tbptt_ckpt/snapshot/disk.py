"""The few system calls a snapshot is made of, in one place, so that a test can fail each."""

from __future__ import annotations

import os
from pathlib import Path


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
        """Make a new file and return its descriptor."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

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
