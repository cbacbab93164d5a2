"""What a user means by a memory budget."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from tbptt_ckpt.errors import ArgumentError, InfeasibleBudgetError
from tbptt_ckpt.memory.available import free_memory
from tbptt_ckpt.memory.sizes import format_bytes, parse_bytes

# Of what is free, left to others and to what no allocator of tensors sees.
AUTO_FRACTION = 0.8


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


AUTO_BUDGET = Amount(None, None, AUTO_FRACTION)


def parse_budget(given: object) -> Amount | None:
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
        return Amount(given, None, given)
    if not isinstance(given, int | str):
        raise ArgumentError(
            f"memory_budget={given!r} must be bytes as an integer, text such as "
            '"512MiB", or a fraction of the free memory such as 0.5'
        )
    num_bytes = parse_bytes(given, "memory_budget")
    if num_bytes < 1:
        raise ArgumentError(f"memory_budget={given!r} must be at least one byte")
    return Amount(given, num_bytes, 1.0)


def explained(
    error: InfeasibleBudgetError,
    budget: Amount,
    budget_bytes: int,
    num_steps: int,
    fixed_strategy: str | None,
) -> InfeasibleBudgetError:
    """The planner's error about a window, as one about `memory_budget`.

    Args:
        error: With the smallest budget and the largest reach.
        budget: What the user asked for.
        budget_bytes: The same in bytes.
        num_steps: Reach of the window.
        fixed_strategy: Its name; None where the fastest plan was looked for.
    """
    smallest, optimal = error.smallest_budget_bytes, error.optimal_budget_bytes
    assert smallest is not None
    assert optimal is not None
    given = format_bytes(budget_bytes)
    if budget.num_bytes is None:
        given = f"{budget.given} ({given})"
    who, choices = "", [f"raise it to {smallest} bytes"]
    if fixed_strategy is not None:
        who = f" under strategy={fixed_strategy}"
        choices.append(f"use strategy='optimal', which works from {optimal} bytes")
    elif error.largest_steps:
        choices.append(f"lower k2 to {error.largest_steps}")
    return InfeasibleBudgetError(
        f"memory_budget={given} is below the {format_bytes(smallest)} that a reach of "
        f"{num_steps} steps needs{who}; {', or '.join(choices)}",
        smallest_budget_bytes=smallest,
        optimal_budget_bytes=optimal,
        largest_steps=error.largest_steps,
    )
