"""Who takes part: each peer under each of its options, and what it needs to be installed."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from benchmarks.peers.protocol import Peer
from benchmarks.peers.work import Work

OURS = "ours"


@dataclass(frozen=True)
class Entry:
    """One row of the table.

    Attributes:
        key: Short name, for the command line and the records.
        label: What the table and the plot call it.
        family: Who it is; entries of one family share a colour.
        place: Module and class of the peer.
        options: Arguments of the class.
        needs: Modules that it imports.
        level_of: Key of the peer whose peak it gets as its budget.
    """

    key: str
    label: str
    family: str
    place: str
    options: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    level_of: str | None = None

    @property
    def missing(self) -> list[str]:
        """What it needs and is not installed."""
        return [module for module in self.needs if find_spec(module) is None]

    def make(self, work: Work, budget_bytes: int | None = None, **further: Any) -> Peer:
        """The peer, with a byte budget for its temporaries if it takes one, on a `device` too."""
        module, _, name = self.place.partition(":")
        limit = {} if budget_bytes is None else {"budget_bytes": budget_bytes}
        peer: Peer = getattr(importlib.import_module(f"benchmarks.peers.{module}"), name)(
            work, **self.options, **limit, **further
        )
        return peer


def _torch(key: str, label: str, place: str, **options: Any) -> Entry:
    return Entry(key, label, "PyTorch", place, options)


def _checkpoint(key: str, label: str, *, fused: bool, reentrant: bool) -> Entry:
    options = {"fused": fused, "reentrant": reentrant}
    place = "torch_checkpoint:CheckpointPeer"
    return Entry(key, label, "torch.utils.checkpoint", place, options)


def _jax(key: str, label: str, peer: str) -> Entry:
    return Entry(key, label, "JAX", f"jax_scan:{peer}", needs=("jax",))


def _equinox(key: str, checkpoints: int | None) -> Entry:
    label = f"equinox scan, {checkpoints or 'default'} checkpoints"
    options, needs = {"checkpoints": checkpoints}, ("jax", "equinox")
    return Entry(key, label, "equinox", "equinox_scan:EquinoxPeer", options, needs)


def _torchrl(key: str, backend: str, recompute: str) -> Entry:
    label = f"TorchRL LSTMModule, {backend}{', recomputed' if recompute == 'full' else ''}"
    needs = ("torchrl", *(["hoptorch"] if backend == "scan" else []))
    options = {"backend": backend, "recompute": recompute}
    return Entry(key, label, "TorchRL", "torchrl_lstm:TorchRLPeer", options, needs)


def _ours(key: str, label: str, *, fused: bool = False, **options: Any) -> Entry:
    return Entry(key, f"ours, {label}", OURS, "ours:OursPeer", {"fused": fused, **options})


BASELINE = _torch("plain-cell", "LSTMCell loop, plain BPTT", "torch_plain:PlainPeer", fused=False)

PEERS = (
    BASELINE,
    _torch("plain-lstm", "nn.LSTM, plain BPTT", "torch_plain:PlainPeer", fused=True),
    _checkpoint("ckpt-cell", "LSTMCell, checkpoint", fused=False, reentrant=False),
    _checkpoint("ckpt-cell-re", "LSTMCell, reentrant checkpoint", fused=False, reentrant=True),
    _checkpoint("ckpt-lstm", "nn.LSTM, checkpoint", fused=True, reentrant=False),
    _torch("scan", "torch.scan", "torch_scan:TorchScanPeer", checkpointed=False),
    _torch("scan-ckpt", "torch.scan, checkpoint", "torch_scan:TorchScanPeer", checkpointed=True),
    _torchrl("torchrl-pad", "pad", "none"),
    _torchrl("torchrl-scan", "scan", "none"),
    _torchrl("torchrl-full", "scan", "full"),
    Entry("forum", "forum's algorithm, repaired", "forum", "forum:ForumPeer", {"fused": False}),
    Entry(
        "ignite",
        "Ignite TBPTT trainer",
        "Ignite",
        "ignite_trainer:IgnitePeer",
        {"fused": False},
        ("ignite",),
    ),
    _jax("jax-scan", "JAX lax.scan", "ScanPeer"),
    _jax("jax-nested", "JAX nested scan, jax.checkpoint", "NestedScanPeer"),
    _equinox("equinox", None),
    _equinox("equinox-10", 10),
)

FIXED = (
    _ours("ours-cell-retain", "LSTMCell, retain", strategy="retain"),
    _ours("ours-cell-32", "LSTMCell, uniform:32", strategy="uniform:32"),
    _ours(
        "ours-cell-32-ckpt",
        "LSTMCell, uniform:32, one graph",
        strategy="uniform:32",
        executor="checkpoint",
    ),
    _ours("ours-cell-revolve", "LSTMCell, revolve:40", strategy="revolve:40"),
    _ours("ours-parts-32", "Recurrent(LSTMCell), uniform:32", declared=True, strategy="uniform:32"),
    _ours("ours-compiled-32", "LSTMCell compiled, uniform:32", compile=True, strategy="uniform:32"),
    _ours("ours-lstm-16", "nn.LSTM, uniform:16", fused=True, strategy="uniform:16"),
    _ours("ours-lstm-retain", "nn.LSTM, retain", fused=True, strategy="retain"),
)


MODELS = {
    "cell": ("LSTMCell", {"fused": False}),
    "parts": ("Recurrent(LSTMCell)", {"fused": False, "declared": True}),
    "lstm": ("nn.LSTM", {"fused": True}),
}


def _within(model: str, peer: str) -> Entry:
    """Ours, with the peak of a peer as budget."""
    (theirs,) = (entry for entry in PEERS if entry.key == peer)
    name, options = MODELS[model]
    label = f"ours, {name}, memory of: {theirs.label}"
    key = f"ours-{model}-at-{peer}"
    return Entry(key, label, OURS, "ours:OursPeer", options, theirs.needs, peer)


BUDGETED = (
    *(_within("cell", peer) for peer in ("jax-nested", "ckpt-cell", "equinox", "equinox-10")),
    *(_within("parts", peer) for peer in ("jax-nested", "ckpt-lstm", "equinox", "equinox-10")),
    *(
        _within("lstm", peer)
        for peer in ("ckpt-lstm", "jax-nested", "ckpt-cell", "equinox", "torchrl-full")
    ),
)

ENTRIES = PEERS + FIXED + BUDGETED


def entry_of(key: str) -> Entry:
    """The entry of this key.

    Raises:
        KeyError: There is none.
    """
    return {entry.key: entry for entry in ENTRIES}[key]
