"""What a model is trained for: its loss on bytes, its score on held-out ones, and what to beat."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from tbptt_ckpt import evaluate
from tbptt_ckpt.cli.bytes.corpus import ByteArray, ByteLanes
from tbptt_ckpt.cli.bytes.models import VOCAB_SIZE, initial_state, is_per_step
from tbptt_ckpt.cli.devices import autocast_dtype
from tbptt_ckpt.data.source import check_mapped
from tbptt_ckpt.profiling.workload import Workload

NATS_PER_BIT = math.log(2.0)
CLIP_GRAD_NORM = 1.0
# Added to every count of the bigram table. On source text 0.1 gives a better table, so a harder
# baseline, than 1.
_SMOOTHING = 0.1
_CHUNK_BYTES = 1 << 20
# A table of 65,536 numbers learns nothing from more text than this.
_MOST_BYTES = 64 << 20


def byte_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats, at least in float32, over one step or over a segment."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def byte_work(
    module: nn.Module, source: ByteLanes, *, lr: float, dtype: str, init_state: Any = None
) -> Workload:
    """What `TBPTT` is given for a byte-level model, choices of windows and plans aside."""
    return Workload(
        module=module,
        loss_fn=byte_loss,
        source=source,
        init_state=init_state,
        optimizer=torch.optim.Adam(module.parameters(), lr=lr),
        per_step=is_per_step(module),
        clip_grad_norm=CLIP_GRAD_NORM,
        autocast_dtype=autocast_dtype(dtype),
    )


def bits_per_byte(
    module: nn.Module,
    source: ByteLanes,
    *,
    segment_steps: int,
    autocast_dtype: torch.dtype | None = None,
) -> float:
    """Mean bits per byte over all of `source`, with the state carried through it.

    Memory does not grow with the source: nothing is recorded, and outputs exist for
    `segment_steps` steps at a time. The model runs in eval mode and keeps the mode it had.
    """
    found = evaluate(
        module,
        byte_loss,
        source,
        initial_state(module, source.lanes),
        segment_steps=segment_steps,
        per_step=is_per_step(module),
        autocast_dtype=autocast_dtype,
    )
    assert found.loss is not None, "every byte has a next byte"
    return found.loss / NATS_PER_BIT


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
    counts = np.zeros(VOCAB_SIZE * VOCAB_SIZE, dtype=np.int64)
    for start in range(0, len(data) - 1, _CHUNK_BYTES):
        check_mapped(data)
        part = data[start : start + _CHUNK_BYTES + 1].astype(np.int64)
        counts += np.bincount(part[:-1] * VOCAB_SIZE + part[1:], minlength=VOCAB_SIZE * VOCAB_SIZE)
    return counts.reshape(VOCAB_SIZE, VOCAB_SIZE).astype(np.float64)
