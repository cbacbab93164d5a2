"""What was batched over time and what was left to the plain operation, and why."""

from __future__ import annotations

from dataclasses import dataclass

SMALL = "too small to pay"  # reasons under "auto"
SLOWER = "plans without time batching are faster by measurement"
CHANGED = "a weight that changed within the segment"


@dataclass(frozen=True, slots=True)
class BatchedOperation:
    """An operation of the module's step.

    Attributes:
        operation: Such as "linear", "LSTMCell", or "linear of inputs" for one that was made
            for all steps at once.
        shape: Of its weight; empty where it was left to the plain operation.
        reason: Why it was left; empty where it was batched.
        count: Segments in which it was batched, or calls that were left.
    """

    operation: str
    shape: tuple[int, ...]
    reason: str
    count: int


class Tally:
    """Counts operations that were batched and that were not."""

    def __init__(self) -> None:
        self._batched: dict[tuple[str, tuple[int, ...]], int] = {}
        self._left: dict[tuple[str, str], int] = {}

    def batched(self, operation: str, shape: tuple[int, ...]) -> None:
        """An operation is batched in a segment."""
        key = (operation, shape)
        self._batched[key] = self._batched.get(key, 0) + 1

    def left(self, operation: str, reason: str) -> None:
        """A call is left to the plain operation."""
        key = (operation, reason)
        self._left[key] = self._left.get(key, 0) + 1

    @property
    def has_batched(self) -> bool:
        """Whether anything was batched."""
        return bool(self._batched)

    def operations(self) -> list[BatchedOperation]:
        """All that was seen, batched operations first."""
        batched = [
            BatchedOperation(operation, shape, "", count)
            for (operation, shape), count in self._batched.items()
        ]
        left = [
            BatchedOperation(operation, (), reason, count)
            for (operation, reason), count in self._left.items()
        ]
        return batched + left
