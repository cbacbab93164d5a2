"""Where the states that a window keeps lie: in memory, or in a file.

NOTE [Why a file without a name]
It is removed by the kernel when it is closed, also where the process is killed. It is written and
read by system calls and not mapped: a full disk is then an error of a write, where a mapped page
that finds no room ends the process. What was written lies in the kernel's cache as long as there
is room, which is no memory of the process.
"""

from __future__ import annotations

import errno
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, ClassVar, NamedTuple

import torch
from torch import Tensor

from tbptt_ckpt.errors import ArgumentError, TbpttError, shown
from tbptt_ckpt.executor.boundary import Boundary, address_of
from tbptt_ckpt.module.ambient import AmbientState
from tbptt_ckpt.module.trees import Tree, map_tensors, memory_of

_ALIGNED = 64  # bytes; where the next tensor begins
_TRIED, _TRIED_BYTES = 16, 64 << 20  # states that are written and read to learn the time of one
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class KeptStates:
    """The states that one window keeps, in memory.

    Attributes:
        rounds: Whether what is found is not, bit by bit, what was kept.
    """

    rounds = False

    def __init__(self) -> None:
        self._boundaries: dict[int, Boundary] = {}

    def __contains__(self, step: int) -> bool:
        return step in self._boundaries

    def keep(self, boundary: Boundary, handed_on: Mapping[int, int]) -> Boundary:
        """Keep a state; where to go on from. What lies at addresses `handed_on` stays there."""
        kept = self._boundaries[boundary.step] = boundary.copied(handed_on)
        return kept

    def find(self, step: int) -> Boundary:
        """The state kept at a step."""
        return self._boundaries[step]

    def drop(self, step: int) -> None:
        """Keep it no longer."""
        del self._boundaries[step]

    def close(self) -> None:
        """Nothing is kept any longer."""
        self._boundaries.clear()


class _Stored(NamedTuple):
    """A tensor whose values are in the file."""

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    num_bytes: int


class _Record(NamedTuple):
    """A state in the file: where it begins, what is in its tensors' places, and what it finds."""

    offset: int
    room: int
    frame: Tree
    ambient: AmbientState


class StatesInFile(KeptStates):
    """The same in a file of a folder; generators, buffers and what is handed on stay in memory."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._records: dict[int, _Record] = {}
        self._file: IO[bytes] | None = None
        self._end, self._free = 0, dict[int, list[int]]()  # offsets of dropped states, by room
        self._frame: Tree = None  # of the last state: most are alike

    def __contains__(self, step: int) -> bool:
        return step in self._records

    def keep(self, boundary: Boundary, handed_on: Mapping[int, int]) -> Boundary:
        """Write a state; the run goes on from it as it is."""
        tensors: list[Tensor] = []

        def stored(tensor: Tensor) -> Tensor | _Stored:
            if address_of(tensor) in handed_on:
                return tensor
            tensors.append(dense := _on_host(tensor))
            about = tensor.size(), dense.stride(), dense.dtype, tensor.device, dense.nbytes
            return _Stored(*about)

        frame = map_tensors(stored, boundary.state)
        if _is_plain(frame):
            frame = self._frame = self._frame if frame == self._frame else frame
        room = sum(_room(tensor.nbytes) for tensor in tensors)
        offset = at = self._place(room)
        file = self._opened()
        for tensor in tensors:
            self._folder.write(file, tensor, at)
            at += _room(tensor.nbytes)
        self._records[boundary.step] = _Record(offset, room, frame, boundary.ambient)
        return boundary

    def find(self, step: int) -> Boundary:
        """The state kept at a step, read into memory of its own."""
        record, file = self._records[step], self._opened()
        at = record.offset

        def read(stored: _Stored) -> Tensor:
            nonlocal at
            tensor = self._folder.read(file, stored, at)
            at += _room(stored.num_bytes)
            return tensor.to(stored.device)

        return Boundary(step, map_tensors(read, record.frame, _Stored), record.ambient)

    def drop(self, step: int) -> None:
        """Let later states take its place in the file."""
        record = self._records.pop(step)
        self._free.setdefault(record.room, []).append(record.offset)

    def close(self) -> None:
        """Remove the file."""
        self._records.clear()
        if self._file is not None:
            self._file.close()

    def _place(self, room: int) -> int:
        if free := self._free.get(room):
            return free.pop()
        self._end += room
        return self._end - room

    def _opened(self) -> IO[bytes]:
        if self._file is None:
            self._file = self._folder.new_file()
        return self._file


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder for files of states.

    Attributes:
        path: Where it is.
        is_memory: Whether states take memory of the host there.
    """

    path: Path
    is_memory: ClassVar[bool] = False

    @classmethod
    def checked(cls, name: str, given: str | Path) -> Folder:
        """The folder that an argument names.

        Raises:
            ArgumentError: Files cannot be made there.
        """
        path = Path(given).expanduser().absolute()
        try:
            tempfile.TemporaryFile(dir=path).close()
        except OSError as error:
            raise ArgumentError(
                f"{name}={shown(str(given))} must be a folder in which files can be made, with "
                f"room for the states of a window: {error.strerror}"
            ) from None
        return cls(path)

    def serves(self, _device: torch.device) -> bool:
        """Whether states of a device are elsewhere without it."""
        return True

    def new(self) -> KeptStates:
        """What keeps the states of one window."""
        return StatesInFile(self)

    def new_file(self) -> IO[bytes]:
        """A new file, which is gone when it is closed."""
        try:
            return tempfile.TemporaryFile(dir=self.path, buffering=0)
        except OSError as error:
            raise self._failed("no file could be made there", error) from error

    def write(self, file: IO[bytes], tensor: Tensor, offset: int) -> None:
        """Write a contiguous tensor of the host."""
        rest = _bytes_of(tensor)
        try:
            while len(rest):
                written = os.pwrite(file.fileno(), rest, offset)
                rest, offset = rest[written:], offset + written
        except OSError as error:
            full = error.errno in _NO_ROOM
            what = f"the disk is full after {offset:,} bytes" if full else "writing failed"
            raise self._failed(what, error) from error

    def read(self, file: IO[bytes], stored: _Stored, offset: int) -> Tensor:
        """Read a tensor into new memory of the host."""
        tensor = torch.empty_strided(
            stored.size, stored.stride, dtype=stored.dtype, device=torch.device("cpu")
        )
        rest = _bytes_of(tensor)
        try:
            while len(rest):
                found = _read(file, rest, offset)
                rest, offset = rest[found:], offset + found
        except OSError as error:
            raise self._failed("reading failed", error) from error
        return tensor

    def seconds(self, num_bytes: int, _device: torch.device) -> float:
        """The time of writing a state of so many bytes and of reading it again, measured now."""
        count = max(1, min(_TRIED, _TRIED_BYTES // max(1, num_bytes)))
        tensor = torch.zeros(num_bytes, dtype=torch.uint8, device=torch.device("cpu"))
        about = tensor.size(), tensor.stride(), tensor.dtype, tensor.device, num_bytes
        times = []
        with self.new_file() as file:
            for number in range(count):
                began = time.perf_counter()
                self.write(file, tensor, number * num_bytes)
                self.read(file, _Stored(*about), number * num_bytes)
                times.append(time.perf_counter() - began)
        return sorted(times)[count // 2]

    def __str__(self) -> str:
        return str(self.path)

    def _failed(self, what: str, error: OSError) -> TbpttError:
        return TbpttError(
            f"states are kept in {self.path}, and {what} ({error.strerror}): this window has made "
            "no update; make room, name another folder, or keep fewer states (longer leaves)"
        )


def _read(file: IO[bytes], rest: memoryview, offset: int) -> int:
    """Read some of what is to come."""
    found = os.preadv(file.fileno(), [rest], offset)
    if not found:
        raise OSError(errno.EIO, "the file ends before the state does")
    return found


def _room(num_bytes: int) -> int:
    """Bytes of the file that a tensor takes."""
    return -(-num_bytes // _ALIGNED) * _ALIGNED


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(memory_of(tensor)).cast("B") if tensor.nbytes else memoryview(b"")


def _is_plain(frame: Tree) -> bool:
    """Whether nothing but what is stored is in it."""
    is_tuple = type(frame) is tuple and all(isinstance(item, _Stored) for item in frame)
    return is_tuple or isinstance(frame, _Stored)


def _on_host(tensor: Tensor) -> Tensor:
    """The tensor's values in one piece of the host's memory, in the order that a copy has."""
    if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.is_quantized:
        raise ArgumentError(
            f"a state has a {type(tensor).__name__} ({tensor.layout}), and only dense tensors are "
            "kept in a file; leave offload out"
        )
    values = tensor.resolve_conj().resolve_neg().to("cpu")
    return values if values.is_contiguous() else values.clone()
