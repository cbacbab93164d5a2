"""Losses by name, and which one goes with targets."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tbptt_ckpt.cli.factory import find_object
from tbptt_ckpt.errors import ArgumentError

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over all positions, at least in float32: logits [..., V], classes [...]."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


LOSSES: dict[str, Loss] = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "huber": F.huber_loss,
    "cross_entropy": cross_entropy,
    "bce": F.binary_cross_entropy_with_logits,
}


def find_loss(name: str | None, *, has_classes: bool) -> tuple[str, Loss]:
    """A loss and its name; for None the one that goes with classes, or with other numbers."""
    name = name or ("cross_entropy" if has_classes else "mse")
    if name in LOSSES:
        return name, LOSSES[name]
    if ":" not in name:
        known = ", ".join(LOSSES)
        raise ArgumentError(f"--loss {name} is neither {known}, nor your own file.py:function")
    return name, find_object("--loss", name)
