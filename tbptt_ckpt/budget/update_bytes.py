"""What an update of the weights takes, found out on small stand-ins for the weights.

An optimizer makes its state in its first step, when a plan has long been made. The same
optimizer class with the same options therefore steps on zeros of the same shapes. Large ones
are shortened in their first dimension; an optimizer's state and what a step allocates are
straight lines in that length, factored optimizers included.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tbptt_ckpt.memory.exhausted import older_garbage_kept
from tbptt_ckpt.memory.meter import peak_memory
from tbptt_ckpt.memory.storages import tensor_bytes
from tbptt_ckpt.updates.shards import local_part
from tbptt_ckpt.updates.updater import Updater

_SMALL_BYTES = 1 << 20  # weights up to this size have stand-ins of full size
# Stand-ins are so large, and of so many times as many rows, that what an allocator rounds up is
# little of them, or nothing.
_STAND_IN_BYTES, _ROWS, _EVEN_ROWS = 1 << 16, 32, 512
_ALL = 1.75  # held together for two weights over one, above which all are taken to be held
# Where the class cannot be made again: Adam's state, and as much once more in a step.
_ASSUMED_STATES, _ASSUMED_TRANSIENTS = 2, 2


@dataclass(frozen=True, slots=True)
class UpdateBytes:
    """Bytes of an optimizer's state, existing or still to come, and of a step above it."""

    state: int
    transient: int


def update_bytes(updater: Updater, *, copies_weights: bool = False) -> UpdateBytes:
    """Measure an updater's optimizer; nothing for none.

    Args:
        updater: Whose.
        copies_weights: Whether an update copies weights and state until it is done.
    """
    if updater.optimizer is None:
        return UpdateBytes(0, 0)
    trained = [p for p in updater.optimized() if p.requires_grad]
    try:
        with older_garbage_kept():
            found = _on_stand_ins(updater, [local_part(p).detach() for p in trained])
    except Exception:  # whatever the constructor or step of a foreign class raises
        size = tensor_bytes(trained)
        found = UpdateBytes(_ASSUMED_STATES * size, _ASSUMED_TRANSIENTS * size)
    if trained and all(p in updater.optimizer.state for p in trained):
        found = UpdateBytes(tensor_bytes(updater.optimizer), found.transient)
    if copies_weights:
        return UpdateBytes(found.state, found.transient + tensor_bytes(trained) + found.state)
    return found


def _on_stand_ins(updater: Updater, trained: Sequence[Tensor]) -> UpdateBytes:
    if tensor_bytes(trained) <= _SMALL_BYTES:
        shapes = [tuple(p.shape) for p in trained]
        return UpdateBytes(*(_one_step(updater, shapes, trained) if trained else (0, 0)))
    kinds = Counter((tuple(p.shape), p.dtype, p.device) for p in trained)
    of_kind = {(tuple(p.shape), p.dtype, p.device): p for p in trained}
    states, transients = 0.0, []
    for kind, count in kinds.items():
        state, transient = _extrapolated(updater, of_kind[kind])
        states += count * state
        transients += [transient] * count
    together = _held_together(updater, max(trained, key=lambda p: p.numel()))
    # A step that goes through the weights one by one may still hold what the last one took.
    total = sum(transients) if together > _ALL else max(transients) * together
    return UpdateBytes(round(states), round(total))


def _extrapolated(updater: Updater, weight: Tensor) -> tuple[float, float]:
    shape, rows = tuple(weight.shape), _rows(weight)
    if not shape or shape[0] <= 2 * rows:
        return _one_step(updater, [shape], [weight])
    short, long = (_one_step(updater, [(n, *shape[1:])], [weight]) for n in (rows, 2 * rows))
    factor = shape[0] / rows - 1
    state, transient = (a + (b - a) * factor for a, b in zip(short, long, strict=True))
    return state, transient


def _rows(weight: Tensor) -> int:
    """Of the shorter stand-in for a weight; the longer one has twice as many."""
    row_bytes = max(1, weight.nbytes // weight.shape[0]) if weight.dim() and weight.numel() else 1
    if _ROWS * row_bytes >= _STAND_IN_BYTES:
        return _ROWS
    return _EVEN_ROWS * math.ceil(_STAND_IN_BYTES / row_bytes / _EVEN_ROWS)


def _held_together(updater: Updater, weight: Tensor) -> float:
    """What a step allocates for two equal weights over what it allocates for one."""
    shape = (min(weight.shape[0], 2 * _rows(weight)), *weight.shape[1:]) if weight.dim() else ()
    _, one = _one_step(updater, [shape], [weight])
    _, two = _one_step(updater, [shape] * 2, [weight] * 2)
    return max(1.0, two / one) if one else 1.0


def _one_step(
    updater: Updater, shapes: Sequence[tuple[int, ...]], like: Sequence[Tensor]
) -> tuple[int, int]:
    """State and transient bytes of an update of zeros."""
    device = like[0].device
    weights = [
        nn.Parameter(torch.zeros(shape, dtype=weight.dtype, device=weight.device))
        for shape, weight in zip(shapes, like, strict=True)
    ]
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
