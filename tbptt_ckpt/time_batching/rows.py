"""The inputs of consecutive steps, known as one tensor before the first of them runs."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor


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
