"""Writes the files of one snapshot, hashed while they are written."""

from __future__ import annotations

import bisect
import importlib.metadata
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor

from tbptt_ckpt.module.trees import iterate_tensors
from tbptt_ckpt.snapshot.digests import PIECE_BYTES, PieceDigests
from tbptt_ckpt.snapshot.disk import Disk, NewFile, new_file
from tbptt_ckpt.snapshot.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    STATE_FILE,
    FileEntry,
    Manifest,
)

Beside = Callable[[Path], Sequence[FileEntry]]  # writes more files into a folder
_COPIED_BYTES = 1 << 12  # smaller writes are copied rather than looked up


def write_files(
    disk: Disk, folder: Path, step: int, plain: Any, beside: Beside = lambda _: ()
) -> None:
    """Make `folder` and write the state and the manifest there, all of it synced.

    `folder` is a name that is not taken, `plain` what `to_plain` made of the state.

    Raises:
        OSError: The first system call that failed.
    """
    disk.make_directory(folder)
    with PieceDigests() as digests:
        with new_file(folder / STATE_FILE, disk) as file, _no_crc32():
            torch.save(plain, cast(IO[bytes], _HashedFile(file, digests, plain)))
        pieces = digests.finish()
    entry = FileEntry(STATE_FILE, file.num_bytes, PIECE_BYTES, pieces)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    files = (entry, *beside(folder))
    manifest = Manifest(FORMAT_VERSION, step, created, library_versions(), files)
    with new_file(folder / MANIFEST, disk) as file:
        file.write(manifest.encode())
    disk.sync_directory(folder)


def library_versions() -> dict[str, str]:
    """Of what a snapshot depends on."""
    try:
        own = importlib.metadata.version("tbptt-ckpt")
    except importlib.metadata.PackageNotFoundError:
        own = "unknown"  # a tree that is not installed
    return {
        "tbptt_ckpt": own,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


@contextmanager
def _no_crc32() -> Iterator[None]:
    """The archive's own checksums cost as much as writing it; the manifest's are stronger."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class _HashedFile:
    """Hands what `torch.save` writes to the file and, uncopied, to the digests.

    The state's tensors stay where they are until the digests are done.
    """

    def __init__(self, file: NewFile, digests: PieceDigests, plain: Any) -> None:
        self._file, self._digests = file, digests
        ranges = sorted({_memory_of(tensor) for tensor in iterate_tensors(plain)})
        self._starts = [start for start, _ in ranges]
        self._stops = [stop for _, stop in ranges]
        self.flush = file.flush

    def write(self, data: Any) -> int:
        """Write all of it."""
        view = memoryview(data).cast("B")
        self._digests.add(view if self._lasts(view) else memoryview(bytes(view)))
        return self._file.write(view)

    def _lasts(self, view: memoryview) -> bool:
        """Whether the bytes are a tensor's of the state rather than torch's for a moment."""
        if len(view) < _COPIED_BYTES:
            return False
        address = np.frombuffer(view, dtype=np.uint8).__array_interface__["data"][0]
        index = bisect.bisect_right(self._starts, address) - 1
        return index >= 0 and address + len(view) <= self._stops[index]


def _memory_of(tensor: Tensor) -> tuple[int, int]:
    if tensor.layout != torch.strided:
        return (0, 0)
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()
