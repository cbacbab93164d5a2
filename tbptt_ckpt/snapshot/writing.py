"""Writes one snapshot: a temporary directory beside the others, synced, then renamed."""

from __future__ import annotations

import bisect
import contextlib
import importlib.metadata
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor

from tbptt_ckpt.module.trees import iterate_tensors
from tbptt_ckpt.snapshot.digests import PIECE_BYTES, PieceDigests
from tbptt_ckpt.snapshot.disk import Disk
from tbptt_ckpt.snapshot.manifest import FORMAT_VERSION, MANIFEST, FileEntry, Manifest

STATE_FILE = "state.pt"
_WRITE_BYTES = 16 << 20
_COPIED_BYTES = 1 << 12  # smaller writes are copied rather than looked up


def write_files(disk: Disk, folder: Path, step: int, plain: Any) -> Manifest:
    """Make `folder` and write the state and the manifest there, all of it synced.

    Args:
        disk: What to write with.
        folder: A name that is not taken.
        step: Steps trained.
        plain: What `to_plain` made of the state.

    Raises:
        OSError: The first system call that failed.
    """
    disk.make_directory(folder)
    with _created(disk, folder / STATE_FILE) as descriptor, PieceDigests() as digests:
        file = _HashedFile(disk, descriptor, digests, plain)
        with _no_crc32(), file.errors_first():
            torch.save(plain, cast(IO[bytes], file))
        digests.writing_is_done()
        disk.sync(descriptor)
        pieces = digests.finish()
    entry = FileEntry(STATE_FILE, file.num_bytes, PIECE_BYTES, pieces)
    manifest = Manifest(FORMAT_VERSION, step, _now(), library_versions(), (entry,))
    with _created(disk, folder / MANIFEST) as descriptor:
        write_fully(disk, descriptor, memoryview(manifest.encode()))
        disk.sync(descriptor)
    disk.sync_directory(folder)
    return manifest


def library_versions() -> dict[str, str]:
    """Of what a snapshot depends on."""
    try:
        own = importlib.metadata.version("tbptt-ckpt")
    except importlib.metadata.PackageNotFoundError:
        own = "unknown"
    return {
        "tbptt_ckpt": own,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def write_fully(disk: Disk, descriptor: int, view: memoryview) -> None:
    """Write all of `view`, in as many calls as it takes."""
    while len(view):
        view = view[disk.write(descriptor, view[:_WRITE_BYTES]) :]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextmanager
def _created(disk: Disk, path: Path) -> Iterator[int]:
    descriptor = disk.create(path)
    try:
        yield descriptor
    except BaseException:
        with contextlib.suppress(OSError):
            disk.close(descriptor)
        raise
    disk.close(descriptor)


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
    """What `torch.save` writes to: the bytes go to the file and, uncopied, to the digests.

    Args:
        disk: What to write with.
        descriptor: The file.
        digests: Hashes the bytes meanwhile.
        plain: The state, whose tensors stay where they are until the digests are done.
    """

    def __init__(self, disk: Disk, descriptor: int, digests: PieceDigests, plain: Any) -> None:
        self._disk, self._descriptor, self._digests = disk, descriptor, digests
        ranges = sorted({_memory_of(tensor) for tensor in iterate_tensors(plain)})
        self._starts = [start for start, _ in ranges]
        self._stops = [stop for _, stop in ranges]
        self.num_bytes = 0
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of it."""
        view = memoryview(data).cast("B")
        if self._error is not None:
            raise self._error  # torch goes on to write the end of the archive
        try:
            self._digests.add(view if self._lasts(view) else memoryview(bytes(view)))
            write_fully(self._disk, self._descriptor, view)
        except OSError as error:
            self._error = error
            raise
        self.num_bytes += len(view)
        return len(view)

    def flush(self) -> None:
        """Nothing is held back."""

    @contextmanager
    def errors_first(self) -> Iterator[None]:
        """Raise the system's own error; torch hides it behind one about positions."""
        try:
            yield
        except Exception:
            if self._error is not None:
                raise self._error from None
            raise

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
