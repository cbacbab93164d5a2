"""sha256 of a file piece by piece, computed beside the writing of it.

NOTE [A save must not wait for its digests]
sha256 runs at 1-2 GB/s, slower than the page cache takes bytes. A file is therefore hashed
in pieces of fixed size by a few threads (hashlib releases the interpreter lock), which go on
while the file is written and while the disk is waited for.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from types import TracebackType

PIECE_BYTES = 4 << 20
_THREADS = min(4, os.cpu_count() or 1)


def digest(views: Iterable[memoryview | bytes]) -> str:
    """sha256 of the concatenation, in hexadecimal digits."""
    sha = hashlib.sha256()
    for view in views:
        sha.update(view)
    return sha.hexdigest()


class PieceDigests:
    """Hashes what is added, in pieces of `piece_bytes`; used as a context.

    One core is left to whoever writes the file until `writing_is_done`.

    Args:
        piece_bytes: Size of every piece but the last.
    """

    def __init__(self, piece_bytes: int = PIECE_BYTES) -> None:
        self._piece_bytes = piece_bytes
        self._todo: SimpleQueue[tuple[int, list[memoryview]] | None] = SimpleQueue()
        self._done: dict[int, str] = {}
        self._threads: list[Thread] = []
        self._num_pieces = 0
        self._views: list[memoryview] = []
        self._missing = piece_bytes
        for _ in range(max(1, _THREADS - 1)):
            self._add_thread()

    def __enter__(self) -> PieceDigests:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Threads must not read memory that the caller is about to release.
        with contextlib.suppress(Empty):
            while True:
                self._todo.get_nowait()
        self._join()

    def add(self, view: memoryview) -> None:
        """Hash bytes that stay as they are until `finish`."""
        while len(view):
            part, view = view[: self._missing], view[self._missing :]
            self._views.append(part)
            self._missing -= len(part)
            if not self._missing:
                self._close_piece()

    def writing_is_done(self) -> None:
        """From here on the caller waits for the disk, so that its core is free as well."""
        if self._views:
            self._close_piece()
        if _THREADS > 1:
            self._add_thread()

    def finish(self) -> tuple[str, ...]:
        """The digests of all pieces in order."""
        self._join()
        return tuple(self._done[index] for index in range(self._num_pieces))

    def _close_piece(self) -> None:
        self._todo.put((self._num_pieces, self._views))
        self._num_pieces += 1
        self._views, self._missing = [], self._piece_bytes

    def _add_thread(self) -> None:
        thread = Thread(target=self._work, name="tbptt-digest", daemon=True)
        thread.start()
        self._threads.append(thread)

    def _work(self) -> None:
        while (piece := self._todo.get()) is not None:
            self._done[piece[0]] = digest(piece[1])

    def _join(self) -> None:
        for _ in self._threads:
            self._todo.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []


def file_digests(path: Path, piece_bytes: int) -> tuple[str, ...]:
    """The digests of a file's pieces, read now; a few pieces are in memory at a time."""

    def piece(index: int) -> str:
        with path.open("rb", buffering=0) as file:
            file.seek(index * piece_bytes)
            return digest(_parts(file, piece_bytes))

    count = -(-path.stat().st_size // piece_bytes)
    with ThreadPoolExecutor(_THREADS, "tbptt-digest") as pool:
        return tuple(pool.map(piece, range(count)))


def _parts(file: FileIO, num_bytes: int) -> Iterator[bytes]:
    while num_bytes and (part := file.read(min(num_bytes, PIECE_BYTES))):
        yield part
        num_bytes -= len(part)
