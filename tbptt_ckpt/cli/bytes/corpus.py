"""Text as bytes: where it comes from, and how it is cut into lanes."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tbptt_ckpt.arguments import PositiveInt, checked
from tbptt_ckpt.data.arrays import map_file
from tbptt_ckpt.data.source import check_mapped, check_range, check_same_source
from tbptt_ckpt.errors import ArgumentError

ByteArray = NDArray[np.uint8]

STANDARD_LIBRARY_BYTES = 4_000_000
HELD_OUT_PART = 20  # the last twentieth, 5 %
# The standard library in its own order; what is not the library's text, or is text for tests.
_LEFT_OUT = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"}


@dataclass(frozen=True, slots=True)
class Corpus:
    """Bytes to train on, and the last of them to be judged by."""

    name: str
    train: ByteArray
    held_out: ByteArray


class ByteLanes:
    """A byte array as parallel lanes of next-byte prediction; a source for `TBPTT`.

    Lane b reads the b-th of `lanes` equal, contiguous stretches, one byte a step; each
    byte's target is the byte after it. Equal lanes need no padding, weights or resets, and
    are read in one piece, which makes a read cheaper than that of a `LaneSource`. A read
    touches the bytes it returns and no others, so a memory-mapped file stays on disk. With
    `max_steps` only the first steps of each stretch are offered.
    """

    time_dim = 0

    @checked
    def __init__(
        self,
        data: ByteArray,
        lanes: PositiveInt,
        *,
        device: torch.device | str = "cpu",
        max_steps: PositiveInt | None = None,
    ) -> None:
        self._lane_steps = (len(data) - 1) // lanes
        if self._lane_steps < 1:
            raise ArgumentError(
                f"{len(data)} bytes are too short for lanes={lanes}, which need {lanes + 1}"
            )
        self.data, self.lanes, self.device = data, lanes, torch.device(device)
        self._num_steps = min(self._lane_steps, max_steps or self._lane_steps)

    def __len__(self) -> int:
        return self._num_steps

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Bytes and next bytes of the steps `[start, stop)`: two tensors [stop - start, lanes]."""
        check_range(start, stop, self._num_steps)
        check_mapped(self.data)
        offsets = (lane * self._lane_steps for lane in range(self.lanes))
        rows = np.stack([self.data[o + start : o + stop + 1] for o in offsets])
        steps = torch.from_numpy(np.ascontiguousarray(rows.T, dtype=np.int64)).to(self.device)
        return steps[:-1], steps[1:]

    def state_dict(self) -> dict[str, Any]:
        """What identifies the lanes; a read depends on its arguments alone."""
        return {"num_bytes": len(self.data), "lanes": self.lanes, "num_steps": self._num_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Accept what `state_dict` of equal lanes returned."""
        check_same_source(state, self.state_dict())


def load_corpus(path: Path | None, lanes: int) -> Corpus:
    """The file at `path`, memory-mapped, or the standard library's source text if None."""
    if path is None:
        name, data = "the Python standard library", standard_library_text()
    else:
        name, data = str(path), map_bytes(path)
    needed = HELD_OUT_PART * (lanes + 1)  # one step of every held-out lane
    if len(data) < needed:
        raise ArgumentError(
            f"{name} has {len(data)} bytes, too short for --lanes {lanes}, which needs {needed}; "
            "take a longer text or fewer lanes"
        )
    cut = len(data) - len(data) // HELD_OUT_PART
    return Corpus(name, data[:cut], data[cut:])


def map_bytes(path: Path) -> ByteArray:
    """The bytes of a file, memory-mapped for reading."""
    try:
        return map_file(path, np.uint8)
    except ArgumentError as error:
        raise ArgumentError(f"--data {error}") from error


def standard_library_text(
    num_bytes: int = STANDARD_LIBRARY_BYTES, directory: Path | None = None
) -> ByteArray:
    """The first bytes of a standard library's source files, by default this Python's."""
    directory = directory or Path(sysconfig.get_paths()["stdlib"])
    text = bytearray()
    for path in standard_library_files(directory):
        try:
            text += path.read_bytes()
        except OSError as error:
            raise ArgumentError(
                f"the Python standard library's {path} cannot be read: {error.strerror}; "
                "name a text with --data FILE"
            ) from error
        if len(text) >= num_bytes:
            return np.frombuffer(bytes(text[:num_bytes]), dtype=np.uint8)
    raise ArgumentError(
        f"the Python standard library at {directory} has only {len(text)} bytes of source files, "
        f"{num_bytes} are needed (some distributions strip them); name a text with --data FILE"
    )


def standard_library_files(directory: Path) -> Iterator[Path]:
    """Top-level modules in order of their names, then those of the packages."""
    yield from sorted(path for path in directory.glob("*.py") if path.is_file())
    for folder, subfolders, names in os.walk(directory):
        subfolders[:] = sorted(name for name in subfolders if name not in _LEFT_OUT)
        if Path(folder) != directory:
            yield from (Path(folder, name) for name in sorted(names) if name.endswith(".py"))
