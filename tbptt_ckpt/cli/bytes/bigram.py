"""The baseline to beat: a table of which byte follows which."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tbptt_ckpt.cli.bytes.corpus import ByteArray, ByteLanes

_VOCAB = 256
# Added to every count. On source text 0.1 gives a better table, so a harder baseline, than 1.
_SMOOTHING = 0.1
_CHUNK_BYTES = 1 << 20
# A table of 65,536 numbers learns nothing from more text than this.
_MOST_BYTES = 64 << 20


def bigram_bits(train: ByteArray, held_out: ByteLanes) -> float:
    """Bits per byte of a bigram table, fitted on `train`, on the pairs that `held_out` reads.

    The table is fitted on all of `train`, up to 64 MiB of it, whether or not the model
    reads that much.
    """
    counts = pair_counts(train[:_MOST_BYTES]) + _SMOOTHING
    bits = -np.log2(counts / counts.sum(axis=1, keepdims=True))
    total, num_steps = 0.0, len(held_out)
    chunk_steps = max(1, _CHUNK_BYTES // held_out.lanes)
    for start in range(0, num_steps, chunk_steps):
        inputs, targets = held_out.read(start, min(start + chunk_steps, num_steps))
        total += float(bits[inputs.cpu().numpy(), targets.cpu().numpy()].sum())
    return total / (num_steps * held_out.lanes)


def pair_counts(data: ByteArray) -> NDArray[np.float64]:
    """How often each byte follows each other byte, [256, 256]."""
    counts = np.zeros(_VOCAB * _VOCAB, dtype=np.int64)
    for start in range(0, len(data) - 1, _CHUNK_BYTES):
        part = data[start : start + _CHUNK_BYTES + 1].astype(np.int64)
        counts += np.bincount(part[:-1] * _VOCAB + part[1:], minlength=_VOCAB * _VOCAB)
    return counts.reshape(_VOCAB, _VOCAB).astype(np.float64)
