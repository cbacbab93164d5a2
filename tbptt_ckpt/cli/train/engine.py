"""Puts `TBPTT` together from the options of a run."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from tbptt_ckpt import TBPTT
from tbptt_ckpt.cli.bytes.contract import is_per_step
from tbptt_ckpt.cli.bytes.score import byte_loss
from tbptt_ckpt.cli.devices import autocast_dtype
from tbptt_ckpt.cli.train.config import TrainingConfig
from tbptt_ckpt.engine.options import ExecutorName, Overlap

CLIP_GRAD_NORM = 1.0


def build_engine(
    config: TrainingConfig, module: nn.Module, optimizer: torch.optim.Optimizer
) -> TBPTT:
    """`TBPTT` as the options say, for this module and optimizer."""
    return TBPTT(
        module,
        byte_loss,
        config.k1,
        config.k2,
        optimizer,
        overlap=cast("Overlap", config.overlap),
        strategy=config.strategy,
        memory_budget=config.memory_budget(),
        executor=cast("ExecutorName", config.executor),
        per_step=is_per_step(module),
        clip_grad_norm=CLIP_GRAD_NORM,
        autocast_dtype=autocast_dtype(config.dtype),
    )
