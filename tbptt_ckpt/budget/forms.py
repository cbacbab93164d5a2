"""Both forms of a run's steps, batched over time and plain: what they take, and which to run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

from tbptt_ckpt.errors import InfeasibleBudgetError
from tbptt_ckpt.schedule.costs import Costs
from tbptt_ckpt.schedule.plan import PredictedPlan
from tbptt_ckpt.time_batching.policy import TimeBatching

_log = logging.getLogger("tbptt_ckpt")

BATCHED, PLAIN = True, False
_FIRST_SHARE = 0.5  # of the time, for the batched form where both are measured
_LEAST_SHARE = 0.4  # left over, below which a module is too expensive to be measured twice


def costs_of_forms(
    batching: TimeBatching, per_step: bool, measure: Callable[[float], Costs], max_seconds: float
) -> dict[bool, Costs]:
    """What the forms take that there are to choose from; "auto"'s rule is the batched one.

    Args:
        batching: Decides what is batched; at the end as it was.
        per_step: Whether the module takes one step at a time.
        measure: Measures costs within so many seconds.
        max_seconds: For both together.
    """
    if not batching.is_open(per_step):
        return {BATCHED: measure(max_seconds)}
    begun = time.perf_counter()
    costs = {BATCHED: measure(_FIRST_SHARE * max_seconds)}
    left = max_seconds - (time.perf_counter() - begun)
    if batching.has_batched and left >= _LEAST_SHARE * max_seconds:
        with batching.plain():
            costs[PLAIN] = measure(min(left, max_seconds - _FIRST_SHARE * max_seconds))
    return costs


def fastest_form(costs: Mapping[bool, Costs], planned: Callable[[Costs], PredictedPlan]) -> bool:
    """The form whose plan takes the least predicted time; the least bytes where none fits.

    Args:
        costs: Of the forms to choose from.
        planned: The plan that counts under some costs, or raises `InfeasibleBudgetError`.
    """
    if len(costs) == 1:
        return next(iter(costs))

    def rank(form: bool) -> tuple[bool, float]:
        try:
            return False, planned(costs[form]).predicted_seconds
        except InfeasibleBudgetError as error:
            return True, error.smallest_budget_bytes or 0

    ranks = {form: rank(form) for form in costs}
    best = min(ranks, key=ranks.__getitem__)
    found = ("no plan fits" if misses else f"{value:.3g} s" for misses, value in ranks.values())
    _log.info(
        "predicted with time batching: %s, without: %s; steps are %s",
        *found,
        "batched" if best else "left plain",
    )
    return best
