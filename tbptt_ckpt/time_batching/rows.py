"""Entries of one tensor, one for each step: the inputs, and slots, where cells have their gates.

NOTE [Slots are no views]
A slot shares the buffer's memory and not its version counter: autograd saves slots, and a
write into one is no write into the others. Under nested checkpoints the backward finds the
slots of a recomputation, in another buffer than those of the first run; whether they lie side
by side is therefore read from the slots themselves.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tbptt_ckpt.module.trees import Tree, replace_tensors, tensors_of

# Rows of one product over time: more gain little and take memory.
_ROWS_OF_LEAF, _ROWS_OF_ADVANCE = 2048, 256
_FEWEST_STEPS, _MOST_STEPS = 8, 256  # a view of a step costs host memory


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


def _without_memory(tensor: Tensor) -> Tensor:
    """A tensor that shares another's version counter, and nothing else."""
    shared = tensor.detach()
    shared.data = shared.new_empty(0)
    return shared


class Rows:
    """Consecutive steps of something that does not depend on the state.

    The whole, [n, ...], has no graph; entries are the same as the tensors that the module meets,
    one per step; `made` is what was made of all rows at once, by operation and weights.
    """

    def __init__(self, whole: Tensor, entries: Sequence[Tensor], is_made: bool = False) -> None:
        self.whole, self.entries, self._is_made = whole, entries, is_made
        self.made: dict[Hashable, Any] = {}
        self._versions = [entry._version for entry in entries]

    def is_untouched(self, index: int) -> bool:
        """Whether nobody has written into a step's entry."""
        return self.entries[index]._version == self._versions[index]

    def versions(self) -> Sequence[Tensor]:
        """Tensors without elements that have the entries' versions, where the whole has not."""
        return [_without_memory(entry) for entry in self.entries] if self._is_made else ()

    def differentiable(self) -> Sequence[Tensor]:
        """The entries, if gradients go to them."""
        has_graph = torch.is_grad_enabled() and self.entries[0].requires_grad
        return self.entries if has_graph else ()

    @cached_property
    def bounds(self) -> tuple[int, int]:
        """The least and the greatest number in rows of integers."""
        if not self.whole.numel():
            return 0, 0
        least, greatest = self.whole.aminmax()
        return int(least), int(greatest)

    def close(self) -> None:
        """The steps are done."""
        for made in self.made.values():
            made.close()
        self.made.clear()


class Row(NamedTuple):
    """One step's entry: where it is from, and its position there."""

    rows: Rows
    position: int


class InputRows:
    """Gives out the inputs of steps, and knows the tensors of the step that runs by their ids."""

    def __init__(self) -> None:
        self._known: dict[int, Row] = {}

    def find(self, x: Tensor) -> Row | None:
        """The row that x is, if it is one and nobody has written into it."""
        row = self._known.get(id(x))
        return row if row is not None and row.rows.is_untouched(row.position) else None

    def add(self, row: Row) -> Tensor:
        """What was made of a row of this step is a row, too; its tensor."""
        entry = row.rows.entries[row.position]
        self._known[id(entry)] = row  # which holds the entry: its id stays its own
        return entry

    def of_steps(self, inputs: Tree, time_dim: int) -> Iterator[Any] | None:
        """The input of each step, known while that step runs; None where these cannot be rows."""
        tensors = tensors_of(inputs)
        if not tensors or any(t.is_inference() for t in tensors):
            return None
        return self._in_chunks(inputs, tensors, time_dim)

    def _in_chunks(self, inputs: Tree, tensors: Sequence[Tensor], time_dim: int) -> Iterator[Any]:
        first, num_steps = tensors[0], tensors[0].shape[time_dim]
        lanes = first.shape[1 - min(time_dim, 1)] if first.dim() > 1 else 1
        most = _ROWS_OF_LEAF if torch.is_grad_enabled() else _ROWS_OF_ADVANCE
        length = min(max(_FEWEST_STEPS, most // max(lanes, 1)), _MOST_STEPS)
        for begin in range(0, num_steps, length):
            chunk = tensors
            if length < num_steps:
                size = min(length, num_steps - begin)
                chunk = [t.narrow(time_dim, begin, size) for t in tensors]
            yield from self._of_chunk(inputs, [t.movedim(time_dim, 0) for t in chunk])

    def _of_chunk(self, inputs: Tree, wholes: Sequence[Tensor]) -> Iterator[Any]:
        columns = [Rows(whole.detach(), whole.unbind(0)) for whole in wholes]
        is_tensor = isinstance(inputs, Tensor)
        try:
            for index, leaves in enumerate(zip(*(rows.entries for rows in columns), strict=True)):
                self._known = {
                    id(leaf): Row(rows, index) for leaf, rows in zip(leaves, columns, strict=True)
                }
                yield leaves[0] if is_tensor else replace_tensors(inputs, list(leaves))
        finally:
            self._known = {}
            for rows in columns:
                rows.close()
