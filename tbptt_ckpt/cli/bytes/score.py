"""What a model is trained for: its loss on bytes, its score on held-out ones, and what to beat."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tbptt_ckpt.cli.bytes.corpus import ByteArray, load_corpus
from tbptt_ckpt.cli.bytes.models import VOCAB_SIZE
from tbptt_ckpt.cli.devices import DTYPES, autocast_dtype
from tbptt_ckpt.cli.lanes import EqualLanes
from tbptt_ckpt.cli.losses import cross_entropy
from tbptt_ckpt.cli.model_options import ModelOptions
from tbptt_ckpt.cli.task import Baseline, Task, module_workload
from tbptt_ckpt.data.source import check_mapped
from tbptt_ckpt.errors import ArgumentError

NATS_PER_BIT = math.log(2.0)
CLIP_GRAD_NORM = 1.0
# Added to every count of the bigram table. On source text 0.1 gives a better table, so a harder
# baseline, than 1.
_SMOOTHING = 0.1
_CHUNK_BYTES = 1 << 20
# A table of 65,536 numbers learns nothing from more text than this.
_MOST_BYTES = 64 << 20
# No more than this much of the text that is held out is scored.
_MOST_SCORED_BYTES = 1 << 20


def byte_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats over one step or over a segment."""
    if logits.shape[-1:] != (VOCAB_SIZE,):
        expected = [*targets.shape, VOCAB_SIZE]
        raise ArgumentError(f"the model returned logits {list(logits.shape)}, not {expected}")
    return cross_entropy(logits, targets)


def byte_task(options: ModelOptions, module: nn.Module, device: torch.device, lr: float) -> Task:
    """A byte-level language model on the bytes of a text."""
    corpus = load_corpus(options.data, options.lanes)
    module = module.to(device, DTYPES[options.dtype])
    most_steps = max(1, _MOST_SCORED_BYTES // options.lanes)
    held_out = EqualLanes(corpus.held_out, options.lanes, device=device, max_steps=most_steps)
    return Task(
        data=corpus.name,
        workload=module_workload(
            module,
            byte_loss,
            EqualLanes(corpus.train, options.lanes, device=device),
            lr=lr,
            clip_grad_norm=CLIP_GRAD_NORM,
            autocast_dtype=autocast_dtype(options.dtype),
        ),
        held_out=held_out,
        unit="bits per byte",
        unit_size=NATS_PER_BIT,
        baseline=Baseline(
            f"bigram table on the same {len(held_out) * held_out.lanes:,} bytes",
            lambda: bigram_bits(corpus.train, held_out),
        ),
    )


def bigram_bits(train: ByteArray, held_out: EqualLanes) -> float:
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
