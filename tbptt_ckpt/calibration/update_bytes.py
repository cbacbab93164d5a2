"""What an update of the weights takes, found out on small stand-ins for the weights.

An optimizer makes its state in its first step, when a plan has long been made. The same
optimizer class with the same options therefore steps on parameters of the same shapes,
shortened in their first dimension; both its state and what a step allocates are straight
lines in that length for every optimizer of torch, factored ones included.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tbptt_ckpt.memory import peak_memory, tensor_bytes
from tbptt_ckpt.updates import Updater

_SHORT = (8, 16)  # lengths of the first dimension, where the weight's own is longer
# Where the class cannot be made again: Adam's state, and as much once more in a step.
_ASSUMED_STATES, _ASSUMED_TRANSIENTS = 2, 2


@dataclass(frozen=True, slots=True)
class UpdateBytes:
    """Bytes of an optimizer's state, existing or still to come, and of a step above it."""

    state: int
    transient: int


def update_bytes(updater: Updater) -> UpdateBytes:
    """Measure an updater's optimizer; nothing for none."""
    if updater.optimizer is None:
        return UpdateBytes(0, 0)
    trained = [p for p in updater.optimized() if p.requires_grad]
    try:
        found = _on_stand_ins(updater, trained)
    except Exception:  # whatever the constructor or step of a foreign class raises
        size = tensor_bytes(trained)
        found = UpdateBytes(_ASSUMED_STATES * size, _ASSUMED_TRANSIENTS * size)
    if trained and all(p in updater.optimizer.state for p in trained):
        return UpdateBytes(tensor_bytes(updater.optimizer), found.transient)
    return found


def _on_stand_ins(updater: Updater, trained: Sequence[Tensor]) -> UpdateBytes:
    kinds = Counter((tuple(p.shape), p.dtype, p.device) for p in trained)
    states, transients = 0.0, []
    for (shape, dtype, device), count in kinds.items():
        state, transient = _extrapolated(updater, shape, dtype, device)
        states += count * state
        transients += [transient] * count
    total = sum(transients) if _steps_at_once(updater, trained) else max(transients, default=0.0)
    return UpdateBytes(round(states), round(total))


def _extrapolated(
    updater: Updater, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[float, float]:
    if not shape or shape[0] <= _SHORT[1]:
        return _one_step(updater, [shape], dtype, device)
    pairs = [_one_step(updater, [(n, *shape[1:])], dtype, device) for n in _SHORT]
    factor = (shape[0] - _SHORT[0]) / (_SHORT[1] - _SHORT[0])
    state, transient = (a + (b - a) * factor for a, b in zip(*pairs, strict=True))
    return state, transient


def _steps_at_once(updater: Updater, trained: Sequence[Tensor]) -> bool:
    """Whether a step holds what it allocates for all weights together."""
    if len(trained) < 2:
        return False
    largest = max(trained, key=lambda p: p.numel())
    shape = (min(largest.shape[0], 64), *largest.shape[1:]) if largest.dim() else ()
    _, one = _one_step(updater, [shape], largest.dtype, largest.device)
    _, two = _one_step(updater, [shape, shape], largest.dtype, largest.device)
    return two > 1.5 * one


def _one_step(
    updater: Updater, shapes: list[tuple[int, ...]], dtype: torch.dtype, device: torch.device
) -> tuple[float, float]:
    """State and transient bytes of an update of zeros."""
    weights = [nn.Parameter(torch.zeros(s, dtype=dtype, device=device)) for s in shapes]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    step = updater.like(_optimizer_like(updater.optimizer, weights))
    loss = torch.zeros((), device=device)
    with peak_memory(device, held=(), rss=False) as first:
        step.step(loss)
    with peak_memory(device, held=(), rss=False) as later:
        step.step(loss)
    return first.net_bytes, max(first.peak_bytes - first.net_bytes, later.peak_bytes)


def _optimizer_like(optimizer: Any, weights: list[nn.Parameter]) -> Any:
    """A new optimizer of the same class, with the options of the first group."""
    kind = type(optimizer)
    group = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    options = {**optimizer.defaults, **group}
    accepted = inspect.signature(kind.__init__).parameters
    return kind(weights, **{name: value for name, value in options.items() if name in accepted})
