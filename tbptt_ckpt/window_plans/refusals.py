"""Why a budget is refused, in the user's words and with the figures that would do."""

from __future__ import annotations

from tbptt_ckpt.budget import Budget
from tbptt_ckpt.errors import InfeasibleBudgetError
from tbptt_ckpt.memory import format_bytes


def explained(
    error: InfeasibleBudgetError,
    budget: Budget,
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
