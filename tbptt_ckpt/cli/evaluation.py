"""How well a model predicts held-out bytes, found without changing anything."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tbptt_ckpt.ambient import Ambient
from tbptt_ckpt.cli.byte_model import initial_state, is_per_step
from tbptt_ckpt.cli.corpus import ByteLanes

NATS_PER_BIT = math.log(2.0)


def byte_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats, at least in float32, over one step or over a segment."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Leave modes, buffers and random generators as they were, whatever happens inside."""
    modes = [(part, part.training) for part in module.modules()]
    ambient = Ambient([module], module.parameters())
    before = ambient.capture()
    try:
        yield
    finally:
        ambient.restore(before)
        for part, training in modes:
            part.training = training


def bits_per_byte(
    module: nn.Module,
    source: ByteLanes,
    *,
    segment_steps: int,
    autocast_dtype: torch.dtype | None = None,
) -> float:
    """Mean bits per byte over all of `source`, with the state carried through it.

    Memory does not grow with the source: nothing is recorded, and outputs exist for
    `segment_steps` steps at a time.

    Args:
        module: The model, run in eval mode and given back in the mode it had.
        source: The bytes to predict.
        segment_steps: Steps to read at a time.
        autocast_dtype: As in training.
    """
    total, state = 0.0, initial_state(module, source.lanes)
    device = source.device.type
    with (
        untouched(module),
        torch.no_grad(),
        torch.autocast(device, autocast_dtype, enabled=autocast_dtype is not None),
    ):
        module.eval()
        for start in range(0, len(source), segment_steps):
            stop = min(start + segment_steps, len(source))
            nats, state = _segment_nats(module, *source.read(start, stop), state)
            total += nats * (stop - start)
    return total / len(source) / NATS_PER_BIT


def _segment_nats(
    module: nn.Module, inputs: Tensor, targets: Tensor, state: Any
) -> tuple[float, Any]:
    """Mean loss over a segment, and the state at its end."""
    if not is_per_step(module):
        logits, state = module(inputs, state)
        return float(byte_loss(logits, targets)), state
    losses = []
    for step_inputs, step_targets in zip(inputs, targets, strict=True):
        logits, state = module(step_inputs, state)
        losses.append(byte_loss(logits, step_targets))
    return float(torch.stack(losses).mean()), state
