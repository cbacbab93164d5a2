"""Text as bytes, and where it comes from."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tbptt_ckpt.cli.lanes import HELD_OUT_PART, parts
from tbptt_ckpt.data.arrays import map_file
from tbptt_ckpt.errors import ArgumentError

ByteArray = NDArray[np.uint8]

STANDARD_LIBRARY_BYTES = 4_000_000
# The standard library in its own order; what is not the library's text, or is text for tests.
_LEFT_OUT = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"}


@dataclass(frozen=True, slots=True)
class Corpus:
    """Bytes to train on, and the last of them to be judged by."""

    name: str
    train: ByteArray
    held_out: ByteArray


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
    return Corpus(name, *parts(data))


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
