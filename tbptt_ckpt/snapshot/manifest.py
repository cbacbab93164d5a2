"""The manifest of a snapshot: what it holds, by size and sha256; written last, it is the commit."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from tbptt_ckpt.errors import SnapshotError

# Version 1: one file `state.pt` of `torch.save`, plain values only.
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_HEADER = b"tbptt-ckpt snapshot sha256 "


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a snapshot.

    Attributes:
        name: Its name in the snapshot's directory.
        num_bytes: Its size.
        piece_bytes: Size of the pieces it is hashed in.
        sha256: The digest of each piece, in hexadecimal digits.
    """

    name: str
    num_bytes: int
    piece_bytes: int
    sha256: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a snapshot holds.

    Attributes:
        format: Version of the snapshot format.
        step: Steps trained when it was taken.
        created: When, ISO 8601 in UTC.
        versions: Of the libraries that wrote it.
        files: All files but the manifest.
    """

    format: int
    step: int
    created: str
    versions: dict[str, str]
    files: tuple[FileEntry, ...]

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
    fields: dict[str, Any] = json.loads(body)
    if fields.get("format") != FORMAT_VERSION:
        raise SnapshotError(
            f"it has snapshot format {fields.get('format')!r}, written by tbptt-ckpt "
            f"{fields.get('versions', {}).get('tbptt_ckpt', '?')}; this version reads format "
            f"{FORMAT_VERSION}"
        )
    try:
        files = tuple(
            FileEntry(f["name"], f["num_bytes"], f["piece_bytes"], tuple(f["sha256"]))
            for f in fields["files"]
        )
        return Manifest(**{**fields, "files": files})
    except (KeyError, TypeError) as error:
        raise SnapshotError(f"its manifest lacks what format 1 has: {error}") from error
