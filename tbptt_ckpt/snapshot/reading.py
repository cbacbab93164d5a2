"""Reads one snapshot: every byte is checked before anything is deserialised."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from tbptt_ckpt.errors import SnapshotError
from tbptt_ckpt.snapshot.digests import file_digests
from tbptt_ckpt.snapshot.manifest import MANIFEST, Manifest, decode_manifest
from tbptt_ckpt.snapshot.plain import from_plain
from tbptt_ckpt.snapshot.writing import STATE_FILE


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a snapshot, checked, and the sizes of its files compared.

    Raises:
        SnapshotError: What is wrong with it.
    """
    try:
        manifest = decode_manifest((folder / MANIFEST).read_bytes())
        for entry in manifest.files:
            size = (folder / entry.name).stat().st_size
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


def load_state(folder: Path) -> Any:
    """The state in a snapshot that was verified; nothing in it is executed.

    Raises:
        SnapshotError: It holds what `weights_only` refuses.
    """
    try:
        # Always explicit: an environment variable can turn the default off, not this.
        plain = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise SnapshotError(
            f"{STATE_FILE} holds more than plain values and tensors, or no such archive: "
            f"{type(error).__name__}: {first_line}"
        ) from error
    return from_plain(plain)
