"""What an accelerator's allocator reserves beside a run's tensors, where a budget is of that."""

from __future__ import annotations

import torch

from tbptt_ckpt.memory.available import reserved_memory
from tbptt_ckpt.memory.sizes import format_bytes


class Slack:
    """Pieces between the run's tensors, and other tensors of the process.

    Args:
        counts: Whether the budget is of reserved bytes; else there is none.
        num_bytes: The most that was seen before.

    Attributes:
        num_bytes: The most that was seen where it mattered, now.
    """

    def __init__(self, counts: bool, num_bytes: int = 0) -> None:
        self.counts, self.num_bytes = counts, num_bytes
        self._device = torch.device("cpu")

    def begin(self, device: torch.device) -> None:
        """Where memory is reserved."""
        self._device = device

    def begins_beside(self, live_bytes: int) -> bool:
        """With empty caches: take what is reserved beside live bytes; whether it is more."""
        return self._take(reserved_memory(self._device), live_bytes)

    def exceeds(self, budget_bytes: int, reserved_bytes: int | None, peak_bytes: int) -> bool:
        """Take what a window had, if that exceeded the budget; whether it is more than before."""
        is_above = (reserved_bytes or 0) > budget_bytes
        return is_above and self._take(reserved_bytes, peak_bytes)

    def note(self) -> str:
        """What is reserved by now, for a message."""
        reserved = reserved_memory(self._device)
        if reserved is None:
            return ""
        beside = f", {format_bytes(self.num_bytes)} beside the run's tensors" if self.counts else ""
        return f" (torch has {format_bytes(reserved)} of {self._device} reserved{beside})"

    def _take(self, reserved_bytes: int | None, live_bytes: int) -> bool:
        found = (reserved_bytes or 0) - live_bytes
        if not self.counts or found <= self.num_bytes:
            return False
        self.num_bytes = found
        return True
