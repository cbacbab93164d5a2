"""Sums of losses and of their weights.

NOTE [A mean is not multiplied out]
A segment's loss is a mean that stands for so many steps, and most windows divide by that very
number. Between two large kernels an operation on one number takes as long as a thousand where
caches are warm, so the number of steps is kept beside the mean as a factor.
"""

from __future__ import annotations

from torch import Tensor


class LossSum:
    """A running sum of losses, `total * factor`, and of their weights.

    `all_count` says that every position is known to count. Then one look at how a loss of
    torch's is called serves for all of a window: looking takes longer than a small step.
    """

    __slots__ = ("all_count", "factor", "has_looked", "total", "weight")

    def __init__(self, *, all_count: bool = False, has_looked: bool = False) -> None:
        self.all_count, self.has_looked = all_count, has_looked
        self.total: Tensor | None = None
        self.factor = 1.0
        self.weight: float | Tensor = 0.0

    def looks(self) -> bool:
        """Whether the next call is to be watched; the first one always is."""
        before, self.has_looked = self.has_looked, True
        return not (self.all_count and before)

    def add(self, total: Tensor | None, weight: float | Tensor, factor: float = 1.0) -> None:
        """Add one more loss, `total * factor`; None of nothing."""
        if total is None:
            pass
        elif self.total is None:
            self.total, self.factor = total, factor
        elif self.factor == factor:
            self.total = self.total + total
        else:
            self.total, self.factor = _times(self.total, self.factor) + _times(total, factor), 1.0
        self.weight = self.weight + weight

    def value(self) -> Tensor | None:
        """The sum; None of nothing."""
        return None if self.total is None else _times(self.total, self.factor)


def _times(total: Tensor, factor: float) -> Tensor:
    return total if factor == 1.0 else total * factor
