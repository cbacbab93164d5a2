"""Files that a command writes: checked before the work, written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

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
    """Write a file; until it is complete `path` is untouched.

    Raises:
        ArgumentError: It cannot be written.
    """
    check_target(option, path, force=force)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise ArgumentError(f"{option} {path} cannot be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
