"""What a model is trained for: its loss on bytes, its work, and its score on held-out bytes."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tbptt_ckpt import evaluate
from tbptt_ckpt.cli.bytes.corpus import ByteLanes
from tbptt_ckpt.cli.bytes.models import initial_state, is_per_step
from tbptt_ckpt.cli.devices import autocast_dtype
from tbptt_ckpt.profiling.work import Work

NATS_PER_BIT = math.log(2.0)
CLIP_GRAD_NORM = 1.0


def byte_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats, at least in float32, over one step or over a segment."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def byte_work(
    module: nn.Module,
    source: ByteLanes,
    *,
    lr: float,
    dtype: str,
    init_state: Any = None,
) -> Work:
    """What `TBPTT` is given for a byte-level model, choices of windows and plans aside."""
    return Work(
        module=module,
        loss_fn=byte_loss,
        source=source,
        init_state=init_state,
        optimizer=torch.optim.Adam(module.parameters(), lr=lr),
        options={
            "per_step": is_per_step(module),
            "clip_grad_norm": CLIP_GRAD_NORM,
            "autocast_dtype": autocast_dtype(dtype),
        },
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
