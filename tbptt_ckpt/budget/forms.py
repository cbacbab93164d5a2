"""The form in which steps run: of those that are open, the one whose plan takes the least time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tbptt_ckpt.errors import InfeasibleBudgetError
from tbptt_ckpt.schedule.costs import Costs
from tbptt_ckpt.schedule.forms import Form, FormSeconds, described
from tbptt_ckpt.schedule.plan import PredictedPlan
from tbptt_ckpt.time_batching.policy import TimeBatching

_log = logging.getLogger("tbptt_ckpt")

_FIRST_SHARE = 0.5  # of the time, for the first form where several are measured
_LEAST_SHARE = 0.4  # left over, below which a module is too expensive to be measured once more
_MOST_RUNS = 3  # of each step in a plan with room; where there is none others are measured too


def fastest_form(
    batching: TimeBatching,
    forms: Sequence[Form],
    most_seconds: float,
    measured: Callable[[float], Costs],
    planned: Callable[[Costs], PredictedPlan],
    *,
    asked: Form | None = None,
) -> tuple[Costs, FormSeconds]:
    """Measure steps in some forms, and let them run in the one whose plan takes the least time.

    Where time runs out the rest is not weighed, unless nothing fits so far, or only with so little
    room that each step runs many times.

    Args:
        batching: Told of the form.
        forms: The first is measured best, and taken where all are alike.
        most_seconds: All of the time.
        measured: Measures costs in so many seconds.
        planned: The plan that counts under some costs.
        asked: A form that is taken wherever it fits.

    Returns:
        Costs in that form, and what a window is predicted to take in each that was weighed.
    """
    begun = time.perf_counter()
    others = len(forms) - 1  # none where a first step has shown that nothing is open
    share = most_seconds * (_FIRST_SHARE if others and forms[0] != asked else 1.0)
    found, ranks = dict[Form, Costs](), dict[Form, tuple[bool, float]]()
    has_room = False
    for number, form in enumerate(forms, 1):
        with batching.as_form(form):
            found[form] = measured(share)
        batches_nothing = form != "plain" and not batching.has_batched  # so that all are alike
        if not (batches_nothing and ranks):
            ranks[form], this_has_room = _rank(found[form], planned)
            has_room |= this_has_room
        left = most_seconds - (time.perf_counter() - begun)
        fits = not min(ranks.values())[0]
        if (
            (fits and form == asked)
            or (has_room and left < _LEAST_SHARE * most_seconds)
            or batches_nothing
        ):
            break
        share = max(0.0, left / max(1, len(forms) - number))  # what the ones before have left over
    chosen = min(ranks, key=lambda form: ranks[form])
    batching.decide(chosen)
    seconds: FormSeconds = {form: None if misses else s for form, (misses, s) in ranks.items()}
    _log.info("%s", described(chosen, seconds.items()))
    return found[chosen], seconds


def saved_forms(state: Mapping[str, Any], batching: TimeBatching) -> FormSeconds:
    """What a state says of forms, of which the batching is told."""
    rule = state.get("time_batching", True)  # all that older ones say
    batching.decide(state.get("form", "auto" if rule else "plain"))
    return dict(state.get("forms", ()))


def _rank(
    costs: Costs, planned: Callable[[Costs], PredictedPlan]
) -> tuple[tuple[bool, float], bool]:
    """The predicted time, or after all that fit the least bytes; and whether there is room."""
    try:
        plan = planned(costs)
    except InfeasibleBudgetError as error:
        return (True, error.smallest_budget_bytes or 0), False
    if plan.longest_leaf < min(costs.block_steps, plan.num_steps):  # nothing runs by blocks
        return (True, plan.predicted_peak_bytes), False
    return (False, plan.predicted_seconds), plan.executed_steps <= _MOST_RUNS * plan.num_steps
