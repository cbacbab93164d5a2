"""Files that a command writes: refused before the work starts, and whole or not there at all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import nn

from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.snapshot.disk import whole_file


def check_target(option: str, path: Path, *, force: bool) -> None:
    """Raise `ArgumentError` unless a file can be written where an option says."""
    if path.is_dir():
        raise ArgumentError(f"{option} {path} is a directory; name a file")
    if not path.parent.is_dir():
        raise ArgumentError(f"{option} {path}: there is no directory {path.parent}")
    if path.exists() and not force:
        raise ArgumentError(f"{option} {path} exists; add --force to replace it")
    if not os.access(path.parent, os.W_OK):
        raise ArgumentError(f"{option} {path}: {path.parent} is not writable")


def write_text(option: str, path: Path, text: str, *, force: bool) -> None:
    """Write the file that an option names."""
    with _written(option, path, force=force) as file:
        file.write(text.encode("utf-8"))


def save_weights(option: str, path: Path, module: nn.Module, *, force: bool) -> None:
    """Write the module's `state_dict`, from the CPU; equal weights give equal bytes."""
    with _written(option, path, force=force) as file:
        _write_weights(module, file)


def weights_digest(module: nn.Module) -> str:
    """sha256 of the file that `save_weights` would write."""
    hashed = _Hashed()
    _write_weights(module, hashed)
    return hashed.hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a regular file; an empty text where there is none."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Hashed:
    """A file of which only the digest is wanted."""

    def __init__(self) -> None:
        sha = hashlib.sha256()
        self.write, self.hexdigest = sha.update, sha.hexdigest

    def flush(self) -> None:
        """Nothing is held back."""


def _write_weights(module: nn.Module, file: Any) -> None:
    weights = {name: tensor.detach().cpu() for name, tensor in module.state_dict().items()}
    # Given a path, torch.save would write the temporary's name into the archive.
    torch.save(weights, file)


@contextmanager
def _written(option: str, path: Path, *, force: bool) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` when the context ends; until then that is untouched."""
    check_target(option, path, force=force)
    try:
        with whole_file(path) as file:
            yield cast(IO[bytes], file)
    except OSError as error:
        reason = error.strerror or error
        raise ArgumentError(f"{option} {path} cannot be written: {reason}") from error
