"""Gradients that a window finds where nothing clears them, and budgets that are enough for both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import nn

from tbptt_ckpt.budget.fitting import FittingPlans
from tbptt_ckpt.budget.window_budget import Shape
from tbptt_ckpt.errors import InfeasibleBudgetError
from tbptt_ckpt.schedule.costs import Costs
from tbptt_ckpt.updates.updater import Updater


def waiting_bytes(updater: Updater, parameters: Sequence[nn.Parameter]) -> list[int]:
    """Of each weight whose hooks see a window's whole gradient; an earlier one is set aside."""
    weights = updater.deliveries.wholes((*parameters, *updater.optimized()))
    return [weight.nbytes for weight in dict.fromkeys(weights) if updater.deliveries.waits(weight)]


def finding_gradients(costs: Costs, beside_bytes: int) -> Costs:
    """Costs of a window that adds to gradients, from those of one that finds none.

    What it finds of weights is kept until it is checked; `beside_bytes` is what else is there:
    those of a first state, what is kept of them, and what waits for its hooks.
    """
    fixed = replace(costs.fixed, gradients=2 * costs.fixed.gradients + beside_bytes)
    return replace(costs, last_leaf_bytes=None, fixed=fixed)


def enough_for_both(
    error: InfeasibleBudgetError,
    plans: FittingPlans,
    shape: Shape,
    costs_of: Callable[[bool], Costs],
) -> InfeasibleBudgetError:
    """The error about a sequence of one window as one about later sequences too.

    Args:
        error: What was raised about it as it is.
        plans: Where it was planned.
        shape: Its shape.
        costs_of: Costs of a window that finds gradients, or does not.
    """
    found, cleared = (_refused(plans, shape, costs_of(finds)) for finds in (True, False))
    named, least = found and found.smallest_budget_bytes, cleared and cleared.smallest_budget_bytes
    if found is None or not named or named < (error.smallest_budget_bytes or 0):
        return error
    enough = "this budget is enough" if least is None else f"{least} bytes are enough"
    return InfeasibleBudgetError(
        f"{found}; that counts gradients which earlier sequences left, since without an optimizer "
        f"a window adds to them: {enough} where they are cleared before each sequence",
        smallest_budget_bytes=named,
        optimal_budget_bytes=found.optimal_budget_bytes,
        largest_steps=found.largest_steps,
    )


def _refused(plans: FittingPlans, shape: Shape, costs: Costs) -> InfeasibleBudgetError | None:
    try:
        plans.fitting(shape, costs)
    except InfeasibleBudgetError as error:
        return error
    return None
