"""Files that a command writes: refused before the work starts, and whole or not there at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch
from torch import nn

from tbptt_ckpt.errors import ArgumentError


def check_target(option: str, path: Path, *, force: bool) -> None:
    """Raise `ArgumentError` unless a file can be written at `path`.

    Args:
        option: What names the file, for the message.
        path: Where it will be.
        force: Whether a file that is there may be replaced.
    """
    if path.is_dir():
        raise ArgumentError(f"{option} {path} is a directory; name a file")
    if not path.parent.is_dir():
        raise ArgumentError(f"{option} {path}: there is no directory {path.parent}")
    if path.exists() and not force:
        raise ArgumentError(f"{option} {path} exists; add --force to replace it")
    if not os.access(path.parent, os.W_OK):
        raise ArgumentError(f"{option} {path}: {path.parent} is not writable")


def write_text(option: str, path: Path, text: str, *, force: bool) -> None:
    """Write a file.

    Raises:
        ArgumentError: It cannot be written.
    """
    with _whole_file(option, path, force=force) as file:
        file.write(text.encode("utf-8"))


def save_weights(option: str, path: Path, module: nn.Module, *, force: bool) -> None:
    """Write the module's `state_dict`, from the CPU, with `torch.save`.

    Equal weights give equal bytes.

    Raises:
        ArgumentError: The file cannot be written.
    """
    weights = {name: tensor.detach().cpu() for name, tensor in module.state_dict().items()}
    # Given a path, torch.save would write the temporary's name into the archive.
    with _whole_file(option, path, force=force) as file:
        torch.save(weights, file)


@contextmanager
def _whole_file(option: str, path: Path, *, force: bool) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` when the context ends; until then that is untouched."""
    check_target(option, path, force=force)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)  # noqa: PTH105 - one system call, the commit
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise ArgumentError(f"{option} {path} cannot be written: {_reason(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _reason(error: BaseException) -> str:
    """The system's own words, which torch hides behind a message about positions."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return " ".join(str(error).split())
