"""One process at a time writes a directory; the kernel lets go when a process dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import warnings
import weakref
from pathlib import Path

from tbptt_ckpt.errors import SnapshotError, TbpttWarning

_LOCK = ".lock"
_held: weakref.WeakSet[DirectoryLock] = weakref.WeakSet()


class DirectoryLock:
    """Held from `acquire` to `release`, or until nobody has the object any more."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._close: weakref.finalize[..., DirectoryLock] | None = None

    def acquire(self) -> None:
        """Hold the directory, which must exist; where files cannot be locked, warn.

        Raises:
            SnapshotError: Somebody else holds it.
        """
        if self._close is not None and self._close.alive:
            return
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            descriptor = os.open(self._directory / _LOCK, flags, 0o666)
        except OSError:  # nothing can be written there, which the first save will say
            return
        close = weakref.finalize(self, os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            close()
            raise SnapshotError(
                f"another trainer writes {self._directory}: {holder or 'of an unknown process'}; "
                "wait until it ends, or name another directory"
            ) from None
        except OSError as error:
            close()
            message = f"{self._directory} cannot be locked ({error}): let one process write it"
            warnings.warn(message, TbpttWarning, stacklevel=2)
            return
        with contextlib.suppress(OSError):  # only words for the other one
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        self._close = close
        _held.add(self)

    def release(self) -> None:
        """Let others write it."""
        if self._close is not None:
            self._close()


def _let_go() -> None:
    """A forked child, such as a worker that loads data, must not hold what its parent holds."""
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_let_go)
