"""Memory budgets over every kind of source (kinds of section 4)."""

from __future__ import annotations

from .carriers import carried
from .case import Case, Dice


def fits(dice: Dice) -> Case:
    """A budget that there is room in; a fixed strategy is only checked against it."""
    window = {"steps": dice.randint(4, 10), "k1": dice.randint(1, 4), "k2": dice.randint(2, 8)}
    strategy = dice.choice(("auto", "retain", "uniform:2", "sqrt"))
    chosen = {"strategy": strategy, "executor": "replay", "memory_budget": "64MiB"}
    return carried(dice, window=window, options=chosen)


def too_small(dice: Dice) -> Case:
    """A budget that the weights alone exceed."""
    strategy = dice.choice(("auto", "retain", "uniform:2"))
    case = carried(dice, options={"strategy": strategy, "executor": "replay", "memory_budget": 500})
    case.refused, case.names = "the budget is smaller than the weights", ("memory_budget",)
    return case


KINDS = {"budget.fits": fits, "budget.too_small": too_small}
