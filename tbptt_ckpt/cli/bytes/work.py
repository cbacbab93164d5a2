"""What runs on bytes: a model with its loss, its text and its optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tbptt_ckpt.cli.bytes.contract import is_per_step
from tbptt_ckpt.cli.bytes.corpus import ByteLanes
from tbptt_ckpt.cli.bytes.score import byte_loss
from tbptt_ckpt.cli.devices import autocast_dtype
from tbptt_ckpt.profiling.work import Work

CLIP_GRAD_NORM = 1.0


def byte_work(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    source: ByteLanes,
    dtype: str,
    init_state: Any = None,
) -> Work:
    """What `TBPTT` is given for a byte-level model, choices of windows and plans aside."""
    return Work(
        module=module,
        loss_fn=byte_loss,
        source=source,
        init_state=init_state,
        optimizer=optimizer,
        options={
            "per_step": is_per_step(module),
            "clip_grad_norm": CLIP_GRAD_NORM,
            "autocast_dtype": autocast_dtype(dtype),
        },
    )
