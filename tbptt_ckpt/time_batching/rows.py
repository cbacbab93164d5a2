"""The inputs of consecutive steps, known as one tensor before the first of them runs."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn


class Rows:
    """Consecutive steps of something that does not depend on the state.

    Attributes:
        whole: [n, ...], one entry per step.
        made: What was made of all rows at once, by operation and weights.
    """

    __slots__ = ("made", "version", "whole")

    def __init__(self, whole: Tensor) -> None:
        self.whole = whole
        self.version = whole._version
        self.made: dict[Hashable, Any] = {}


class Row:
    """One step's entry, as long as nobody has written into it.

    Attributes:
        rows: Where it is from.
        index: Its position there.
    """

    __slots__ = ("_tensor", "_version", "index", "rows")

    def __init__(self, rows: Rows, index: int, tensor: Tensor, version: int) -> None:
        self.rows, self.index = rows, index
        self._tensor, self._version = tensor, version  # the tensor is held: its id names the row

    def is_untouched(self) -> bool:
        """Whether the step's tensor still holds what `rows` holds."""
        return self._tensor._version == self._version


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is of the plain type."""
    return type(tensor) is Tensor or type(tensor) is nn.Parameter


def transposed_weight(weight: Tensor) -> Tensor | None:
    """The weight whose transpose this is, if it is one."""
    base = weight._base
    if base is None or not is_stable(base) or base.dim() != 2:
        return None
    swapped = (base.stride(1), base.stride(0)) == weight.stride()
    alike = weight.shape == (base.shape[1], base.shape[0]) and swapped
    return base if alike and base.data_ptr() == weight.data_ptr() else None


def is_stable(weight: Tensor) -> bool:
    """Whether a weight cannot have been computed within the step."""
    kind = type(weight)
    if weight.layout is not torch.strided or weight.is_inference():
        return False
    if kind is nn.Parameter:
        return True
    return kind is Tensor and weight.requires_grad and weight.is_leaf
