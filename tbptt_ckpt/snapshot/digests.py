"""sha256 of a file piece by piece, computed beside the writing of it.

NOTE [A save must not wait for its digests]
sha256 runs at 1-2 GB/s, slower than the page cache takes bytes. A file is therefore hashed
in pieces of fixed size by a few threads (hashlib releases the interpreter lock), which go on
while the file is written and while the disk is waited for.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import TypeVar

A = TypeVar("A")
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

    One core is left to whoever writes the file; it helps in `finish`.
    """

    def __init__(self, piece_bytes: int = PIECE_BYTES) -> None:
        self._piece_bytes = self._missing = piece_bytes
        self._pool = ThreadPoolExecutor(max(1, _THREADS - 1), "tbptt-digest")
        self._pieces: list[tuple[list[memoryview], Future[str]]] = []
        self._views: list[memoryview] = []

    def __enter__(self) -> PieceDigests:
        return self

    def __exit__(self, *_: object) -> None:
        # Threads must not read memory that the caller is about to release.
        self._pool.shutdown(cancel_futures=True)

    def add(self, view: memoryview) -> None:
        """Hash bytes that stay as they are until the context is left."""
        while len(view):
            part, view = view[: self._missing], view[self._missing :]
            self._views.append(part)
            self._missing -= len(part)
            if not self._missing:
                self._close_piece()

    def finish(self) -> tuple[str, ...]:
        """The digests of all pieces in order; the caller helps from the last one on."""
        if self._views:
            self._close_piece()
        found = [
            digest(views) if future.cancel() else future.result()
            for views, future in reversed(self._pieces)
        ]
        return tuple(reversed(found))

    def _close_piece(self) -> None:
        self._pieces.append((self._views, _begin(self._pool, digest, self._views)))
        self._views, self._missing = [], self._piece_bytes


def file_digests(path: Path, piece_bytes: int) -> tuple[str, ...]:
    """The digests of a file's pieces, read now; a few pieces are in memory at a time."""

    def piece(index: int) -> str:
        with path.open("rb", buffering=0) as file:
            file.seek(index * piece_bytes)
            return digest(_parts(file, piece_bytes))

    count = -(-path.stat().st_size // piece_bytes)
    with ThreadPoolExecutor(_THREADS, "tbptt-digest") as pool:
        pieces = [_begin(pool, piece, index) for index in range(count)]
        return tuple(future.result() for future in pieces)


def _begin(pool: ThreadPoolExecutor, function: Callable[[A], str], argument: A) -> Future[str]:
    """Have a thread work; where there can be none any more, it is done at once."""
    try:
        return pool.submit(function, argument)
    except RuntimeError:
        done: Future[str] = Future()
        done.set_result(function(argument))
        return done


def _parts(file: FileIO, num_bytes: int) -> Iterator[bytes]:
    while num_bytes and (part := file.read(min(num_bytes, PIECE_BYTES))):
        yield part
        num_bytes -= len(part)
