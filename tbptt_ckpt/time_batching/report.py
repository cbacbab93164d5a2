"""What was batched over time and what was left to the plain operation, and why."""

from __future__ import annotations

from collections import Counter
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
        self._counts: Counter[tuple[str, tuple[int, ...], str]] = Counter()

    def batched(self, operation: str, shape: tuple[int, ...]) -> None:
        """An operation is batched in a segment."""
        self._counts[operation, shape, ""] += 1

    def left(self, operation: str, reason: str) -> None:
        """A call is left to the plain operation."""
        self._counts[operation, (), reason] += 1

    @property
    def has_batched(self) -> bool:
        """Whether anything was batched."""
        return any(not reason for _, _, reason in self._counts)

    def operations(self) -> list[BatchedOperation]:
        """All that was seen, batched operations first."""
        seen = [BatchedOperation(*key, count) for key, count in self._counts.items()]
        return sorted(seen, key=lambda operation: bool(operation.reason))
