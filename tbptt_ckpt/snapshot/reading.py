"""Reads one snapshot: every byte is checked before anything is deserialised."""

from __future__ import annotations

import stat
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tbptt_ckpt.errors import SnapshotError, first_line
from tbptt_ckpt.snapshot.digests import file_digests
from tbptt_ckpt.snapshot.manifest import MANIFEST, STATE_FILE, Manifest, decode_manifest
from tbptt_ckpt.snapshot.plain import from_plain, kept_on_host

_MOST_MANIFEST_BYTES = 64 << 20  # of a state of 3 TiB


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """A snapshot that was verified and read."""

    step: int
    path: Path
    manifest: Manifest
    state: Any


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a snapshot, checked, and the sizes of its files compared.

    Raises:
        SnapshotError: What is wrong with it.
    """
    try:
        if _size(folder / MANIFEST) > _MOST_MANIFEST_BYTES:
            raise SnapshotError(f"{MANIFEST} has more than {_MOST_MANIFEST_BYTES} bytes")
        manifest = decode_manifest((folder / MANIFEST).read_bytes())
        for entry in manifest.files:
            size = _size(folder / entry.name)
            if size != entry.num_bytes:
                raise SnapshotError(
                    f"{entry.name} has {size} bytes, {entry.num_bytes} were written"
                )
    except FileNotFoundError as error:
        raise SnapshotError(f"{Path(error.filename).name} is missing") from error
    except OSError as error:
        raise SnapshotError(f"it cannot be read: {error}") from error
    if folder.name != f"step-{manifest.step}":
        raise SnapshotError(f"its manifest says step {manifest.step}")
    return manifest


def _size(path: Path) -> int:
    """Of a regular file; a link may lead anywhere, and a pipe never ends."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise SnapshotError(f"{path.name} is not a regular file")
    return status.st_size


def verify_files(folder: Path) -> Manifest:
    """The manifest, after every byte of the snapshot was compared with it.

    Raises:
        SnapshotError: What is wrong.
    """
    manifest = read_manifest(folder)
    for entry in manifest.files:
        try:
            pieces = file_digests(folder / entry.name, entry.piece_bytes)
        except OSError as error:
            raise SnapshotError(f"{entry.name} cannot be read: {error}") from error
        if pieces != entry.sha256:
            raise SnapshotError(f"{entry.name} does not match its sha256")
    return manifest


def load_state(folder: Path, copied: Sequence[tuple[str, ...]] = ()) -> Any:
    """The state in a snapshot that was verified; nothing in it is executed.

    What will be `copied` to where it belongs, by the keys where it is, stays on the host: a
    device may have no room for it twice.

    Raises:
        SnapshotError: It holds what `weights_only` refuses, or is no state at all.
    """
    try:
        _check_not_compressed(folder / STATE_FILE)
        # Always explicit: an environment variable can turn the default off, not this.
        plain = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
        _check_is_a_tree(plain)
        for path in copied:
            plain = _on_host(plain, path)
        return from_plain(plain)
    except SnapshotError:
        raise
    except Exception as error:  # whoever can sign it can write anything into it
        raise SnapshotError(
            f"{STATE_FILE} holds more than plain values and tensors, or no such archive: "
            f"{first_line(error)}"
        ) from error


def _on_host(plain: Any, path: Sequence[str]) -> Any:
    """The same, of which the part there stays on the host."""
    if not path:
        return kept_on_host(plain)
    key, *inner = path
    if not isinstance(plain, dict) or key not in plain:
        return plain
    return {**plain, key: _on_host(plain[key], inner)}


def _check_not_compressed(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("it is compressed, and may unfold to any size")


def _check_is_a_tree(plain: Any) -> None:
    """Nothing is written twice; what contains itself, or is in many places, has no end."""
    seen, left = set(), [plain]
    while left:
        value = left.pop()
        if isinstance(value, dict | list | tuple) and value:
            if id(value) in seen:
                raise ValueError("a container is in two places")
            seen.add(id(value))
            left.extend(value.values() if isinstance(value, dict) else value)
