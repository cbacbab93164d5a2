"""Training state on disk: written whole or not at all, trusted only after every byte is checked."""

from tbptt_ckpt.snapshot.reading import Loaded
from tbptt_ckpt.snapshot.store import SnapshotReport, SnapshotStore, SnapshotWarning

__all__ = [
    "Loaded",
    "SnapshotReport",
    "SnapshotStore",
    "SnapshotWarning",
]
