"""A source read over and over, so that warm windows of any reach can be run on little data."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tbptt_ckpt.data.source import as_tensors
from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.module.trees import Tree, replace_tensors, tensors_of


class EndlessSource:
    """The steps of a source in a circle, without targets before `silent_steps`.

    Windows without targets run forward only: a cheap way to the states that a window in the
    middle of a long sequence starts from. Every read is a copy, as it is for a stream.
    """

    def __init__(self, source: Any, silent_steps: int) -> None:
        if not hasattr(source, "__len__") or not len(source):
            raise ArgumentError(f"source={source!r} must have a length of at least one step")
        self._source, self._silent_steps = source, silent_steps
        self.time_dim: int = getattr(source, "time_dim", 0)

    def __len__(self) -> int:
        return sys.maxsize // 2

    def read(self, start: int, stop: int) -> tuple[Tree, Tree]:
        """Inputs and targets of the steps `[start, stop)`; the targets None while silent."""
        parts = [self._source.read(low, high) for low, high in self._pieces(start, stop)]
        silent = stop <= self._silent_steps
        inputs = self._joined([as_tensors(part[0]) for part in parts])
        return inputs, None if silent else self._joined([as_tensors(part[1]) for part in parts])

    def weights(self, start: int, stop: int) -> Tensor | None:
        """The source's own weights of those steps, if it has any."""
        if not hasattr(self._source, "weights") or stop <= self._silent_steps:
            return None
        parts = [self._source.weights(low, high) for low, high in self._pieces(start, stop)]
        known = [torch.as_tensor(part) for part in parts if part is not None]
        return torch.cat(known) if known else None

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        length = len(self._source)
        while start < stop:
            low = start % length
            high = min(length, low + stop - start)
            yield low, high
            start += high - low

    def _joined(self, trees: list[Tree]) -> Tree:
        if not tensors_of(trees[0]):
            return trees[0]
        columns = zip(*(tensors_of(tree) for tree in trees), strict=True)
        return replace_tensors(trees[0], [torch.cat(c, dim=self.time_dim) for c in columns])
