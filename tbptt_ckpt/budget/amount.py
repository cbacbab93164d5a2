"""What a user means by a memory budget."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Annotated

import torch

from tbptt_ckpt.errors import ArgumentError, shown
from tbptt_ckpt.memory.available import free_memory, reserved_memory
from tbptt_ckpt.memory.sizes import format_bytes, no_size, parse_bytes

_FRACTION = re.compile(r"\s*(?:(0*\.\d+|0*1\.0*)|(\d+\.?\d*|\.\d+)\s*%)\s*", re.ASCII)
_RESERVED = re.compile(r"\s*(.*\S)\s+reserved\s*", re.IGNORECASE)
_ALSO = ', or a part of the free memory such as 0.5 or "50%"'


@dataclass(frozen=True, slots=True)
class Amount:
    """The peak of tensor memory that a run may reach, everything included.

    Attributes:
        given: What the user wrote, for messages; None where nothing was.
        num_bytes: Bytes, or None for a fraction.
        fraction: Of what is free when the first window is planned, on top of what the run
            holds then.
        is_reserved: Whether what an accelerator's allocator reserves is meant, and not only what
            it hands out of that.
    """

    given: object
    num_bytes: int | None
    fraction: float
    is_reserved: bool = False

    def check_device(self, device: torch.device) -> None:
        """Raise `ArgumentError` where nothing is reserved of what is meant."""
        if self.is_reserved and reserved_memory(device) is None:
            raise ArgumentError(
                f"memory_budget={shown(self.given)} is of what an accelerator's allocator "
                f"reserves, and that of {device} reserves nothing; leave 'reserved' out"
            )

    def bytes_beside(self, held_bytes: int, device: torch.device) -> int:
        """The budget in bytes, for a run that holds some already."""
        if self.num_bytes is not None:
            return self.num_bytes
        return held_bytes + int(self.fraction * free_memory(device))

    def described(self, budget_bytes: int) -> str:
        """The budget for a message, with what it is in bytes."""
        size = format_bytes(budget_bytes)
        size += self.kind
        return size if self.num_bytes is not None else f"{self.given} ({size})"

    @property
    def kind(self) -> str:
        """What follows a size in a message."""
        return " reserved" if self.is_reserved else ""


AUTO_BUDGET = Amount(None, None, 0.8)  # the rest is others', and what no allocator sees


def parse_budget(given: object, name: str = "memory_budget") -> Amount | None:
    """A budget from bytes, text such as "512MiB", or a part of what is free; None for none.

    A float and text with a point up to "1.0" are a part of what is free, as is "50%"; all other
    text is a size as `parse_bytes` reads it, such as "8G" or "8e9". One such as "8G reserved" is of
    what an accelerator's allocator reserves.

    Raises:
        ArgumentError: Anything else.
    """
    if given is None:
        return None
    if isinstance(given, str) and (size := _RESERVED.fullmatch(given)):
        amount = parse_budget(size[1], name)
        if amount is None or amount.num_bytes is None or amount.is_reserved:
            raise no_size(name, given, '; "reserved" follows a size, as in "8GiB reserved"')
        return replace(amount, given=given, is_reserved=True)
    part = _FRACTION.fullmatch(given) if isinstance(given, str) else None
    if part or isinstance(given, float):
        number = float(given if part is None else part[1] or part[2])  # type: ignore[arg-type]
        fraction = number / 100 if part and part[2] else number
        if not 0 < fraction <= 1:
            raise ArgumentError(
                f"{name}={shown(given)} must be above 0 and at most 1, a fraction of the free "
                'memory; write bytes as an integer, or text such as "512MiB"'
            )
        return Amount(given, None, fraction)
    try:
        num_bytes = parse_bytes(given, name)  # type: ignore[arg-type]
    except ArgumentError:
        raise no_size(name, given, _ALSO) from None
    if num_bytes < 1:
        raise ArgumentError(f"{name}={shown(given)} must be at least one byte")
    return Amount(given, num_bytes, 1.0)


def budget_bytes(given: object, name: str, device: torch.device | str = "cpu") -> int | None:
    """A budget in bytes, for what holds nothing yet; None for none."""
    amount = parse_budget(given, name)
    if amount is not None and amount.is_reserved:
        raise ArgumentError(
            f"{name}={shown(given)}: reserved bytes depend on what ran before, and are known of "
            "training alone; leave 'reserved' out"
        )
    return None if amount is None else amount.bytes_beside(0, torch.device(device))


def check_budget(name: str, value: object, alternative: str | None = None) -> None:
    """Raise `ArgumentError` unless `value` can be read as a budget."""
    parse_budget(value, name)


MemoryBudget = Annotated[int | float | str | None, check_budget]
