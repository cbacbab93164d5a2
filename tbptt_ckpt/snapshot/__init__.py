"""Training state on disk: written whole or not at all, trusted only after every byte is checked."""

from tbptt_ckpt.snapshot.disk import Disk
from tbptt_ckpt.snapshot.manifest import FORMAT_VERSION, MANIFEST, Manifest
from tbptt_ckpt.snapshot.plain import from_plain, to_plain
from tbptt_ckpt.snapshot.reading import load_state, read_manifest, verify_files
from tbptt_ckpt.snapshot.store import Loaded, SnapshotReport, SnapshotStore, SnapshotWarning

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST",
    "Disk",
    "Loaded",
    "Manifest",
    "SnapshotReport",
    "SnapshotStore",
    "SnapshotWarning",
    "from_plain",
    "load_state",
    "read_manifest",
    "to_plain",
    "verify_files",
]
