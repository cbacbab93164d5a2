"""What a user means by a memory budget."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

import torch

from tbptt_ckpt.errors import ArgumentError, shown
from tbptt_ckpt.memory.available import free_memory
from tbptt_ckpt.memory.sizes import format_bytes, parse_bytes

_FRACTION = re.compile(r"0?\.\d*[1-9]\d*|1\.0*")


@dataclass(frozen=True, slots=True)
class Amount:
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

    def described(self, budget_bytes: int) -> str:
        """The budget for a message, with what it is in bytes."""
        size = format_bytes(budget_bytes)
        return size if self.num_bytes is not None else f"{self.given} ({size})"


AUTO_BUDGET = Amount(None, None, 0.8)  # the rest is others', and what no allocator sees


def parse_budget(given: object) -> Amount | None:
    """A budget from bytes, text such as "512MiB", or a fraction of what is free; None for none.

    Text such as "0.5" or "1.0" is a fraction too.

    Raises:
        ArgumentError: Anything else.
    """
    if given is None:
        return None
    if isinstance(given, str) and _FRACTION.fullmatch(given):
        return Amount(given, None, float(given))
    if isinstance(given, float):
        if not 0 < given <= 1:
            raise ArgumentError(
                f"memory_budget={shown(given)} must be above 0 and at most 1, a fraction of the "
                'free memory; write bytes as an integer, or text such as "512MiB"'
            )
        return Amount(given, None, given)
    if not isinstance(given, int | str):
        raise ArgumentError(
            f"memory_budget={shown(given)} must be bytes as an integer, text such as "
            '"512MiB", or a fraction of the free memory such as 0.5'
        )
    num_bytes = parse_bytes(given, "memory_budget")
    if num_bytes < 1:
        raise ArgumentError(f"memory_budget={shown(given)} must be at least one byte")
    return Amount(given, num_bytes, 1.0)


def check_budget(name: str, value: object, alternative: str | None = None) -> None:
    """Raise `ArgumentError` unless `value` can be read as a budget."""
    parse_budget(value)


MemoryBudget = Annotated[int | float | str | None, check_budget]
