"""Pieces of one buffer, one per call of a cell, whose gradients come out as one matrix.

NOTE [Slots are no views]
A slot shares the buffer's memory and not its version counter: autograd saves slots, and a
write into one is no write into the others. Under nested checkpoints the backward finds the
slots of a recomputation, in another buffer than those of the first run; whether they lie side
by side is therefore read from the slots themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def cut(buffer: Tensor) -> list[Tensor]:
    """The entries of buffer: [n, ...] along its first dimension, each with its own version."""
    return [view.data for view in buffer.unbind(0)]


def joined(slots: Sequence[Tensor]) -> Tensor:
    """Slots, or rows of one tensor, of [N, M] each; without a copy where they lie side by side."""
    first = slots[0]
    if len(slots) == 1:
        return first
    step = first.nbytes
    start = first.data_ptr()
    adjacent = first.is_contiguous() and all(
        slot.data_ptr() == start + index * step for index, slot in enumerate(slots)
    )
    same = first.untyped_storage().data_ptr() == slots[-1].untyped_storage().data_ptr()
    if not (adjacent and same):
        return torch.cat(list(slots))
    rows, columns = first.shape
    return first.as_strided((rows * len(slots), columns), (columns, 1))
