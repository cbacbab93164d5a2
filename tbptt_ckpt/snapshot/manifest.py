"""The manifest of a snapshot: what it holds, by size and sha256; written last, it is the commit."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from tbptt_ckpt.errors import SnapshotError

# Version 2: one file of `torch.save`, plain values only.
FORMAT_VERSION = 2
STATE_FILE = "state.pt"
MANIFEST = "manifest.json"
PLACES = ".metadata"  # where shards lie that ranks have written beside the state
_OF_SHARDS = re.compile(rf"{re.escape(PLACES)}|__[0-9]+_[0-9]+\.distcp")
_HEADER = b"tbptt-ckpt snapshot sha256 "


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a snapshot."""

    name: str  # its name in the snapshot's directory
    num_bytes: int  # its size
    piece_bytes: int  # size of the pieces it is hashed in
    sha256: tuple[str, ...]  # the digest of each piece, in hexadecimal digits


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a snapshot holds."""

    format: int  # version of the snapshot format
    step: int  # steps trained when it was taken
    created: str  # when, ISO 8601 in UTC
    versions: dict[str, str]  # of the libraries that wrote it
    files: tuple[FileEntry, ...]  # all files but the manifest

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.num_bytes for file in self.files)

    def encode(self) -> bytes:
        """The manifest as text whose first line holds the sha256 of the others."""
        body = json.dumps(asdict(self), indent=1).encode() + b"\n"
        return _HEADER + hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def decode_manifest(data: bytes) -> Manifest:
    """The manifest that `encode` wrote.

    Raises:
        SnapshotError: A byte that is not as it was written, or a format of another version.
    """
    head, _, body = data.partition(b"\n")
    if head != _HEADER + hashlib.sha256(body).hexdigest().encode():
        raise SnapshotError("its manifest does not match its sha256")
    try:
        fields: dict[str, Any] = json.loads(body)
        _check_format(fields)
        files = tuple(FileEntry(**{**f, "sha256": tuple(f["sha256"])}) for f in fields["files"])
        manifest = Manifest(**{**fields, "files": files})
        _check(manifest)
    except SnapshotError:
        raise
    except Exception as error:  # whoever can sign it can write anything into it
        raise SnapshotError(
            f"its manifest is none of format {FORMAT_VERSION}: {error!r}"
        ) from error
    return manifest


def _check_format(fields: dict[str, Any]) -> None:
    version = fields.get("format")
    if type(version) is not int or version != FORMAT_VERSION:
        writer = fields.get("versions", {}).get("tbptt_ckpt", "?")
        raise SnapshotError(
            f"it has snapshot format {version!r}, written by tbptt-ckpt {writer}; this "
            f"version reads format {FORMAT_VERSION}"
        )


def _check(manifest: Manifest) -> None:
    names = [file.name for file in manifest.files]
    if names[:1] != [STATE_FILE] or not all(map(_OF_SHARDS.fullmatch, names[1:])):
        raise ValueError(f"the files {names!r}")
    if len({*names}) < len(names):
        raise ValueError(f"files that are there twice, of {names!r}")
    for file in manifest.files:
        numbers = (manifest.step, file.num_bytes, file.piece_bytes - 1)
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"the numbers {numbers}")
        if len(file.sha256) != -(-file.num_bytes // file.piece_bytes):
            raise ValueError(f"the file {file.name!r} in {len(file.sha256)} pieces")
    datetime.fromisoformat(manifest.created)  # it is shown, so it must be no other text
    if not all(isinstance(text, str) for pair in manifest.versions.items() for text in pair):
        raise TypeError(f"the versions {manifest.versions!r}")
