"""What a user means by a memory budget."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.memory import free_memory, parse_bytes

# Of what is free, left to others and to what no allocator of tensors sees.
AUTO_FRACTION = 0.8


@dataclass(frozen=True, slots=True)
class Budget:
    """The peak of tensor memory that a run may reach, everything included.

    Attributes:
        given: What the user wrote, for messages; None where nothing was.
        num_bytes: Bytes, or None for a fraction.
        fraction: Of what is free when the first window is planned, on top of what the run
            holds then.
    """

    given: object
    num_bytes: int | None
    fraction: float

    def bytes_beside(self, held_bytes: int, device: torch.device) -> int:
        """The budget in bytes, for a run that holds some already."""
        if self.num_bytes is not None:
            return self.num_bytes
        return held_bytes + int(self.fraction * free_memory(device))


AUTO_BUDGET = Budget(None, None, AUTO_FRACTION)


def parse_budget(given: object) -> Budget | None:
    """A budget from bytes, text such as "512MiB", or a fraction of what is free; None for none.

    Raises:
        ArgumentError: Anything else.
    """
    if given is None:
        return None
    if isinstance(given, float):
        if not 0 < given <= 1 or math.isnan(given):
            raise ArgumentError(
                f"memory_budget={given!r} must be above 0 and at most 1, a fraction of the free "
                'memory; write bytes as an integer, or text such as "512MiB"'
            )
        return Budget(given, None, given)
    if not isinstance(given, int | str):
        raise ArgumentError(
            f"memory_budget={given!r} must be bytes as an integer, text such as "
            '"512MiB", or a fraction of the free memory such as 0.5'
        )
    num_bytes = parse_bytes(given, "memory_budget")
    if num_bytes < 1:
        raise ArgumentError(f"memory_budget={given!r} must be at least one byte")
    return Budget(given, num_bytes, 1.0)
