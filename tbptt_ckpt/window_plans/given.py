"""Costs that somebody gave, held against a few short segments before a budget rests on them."""

from __future__ import annotations

from dataclasses import replace

from tbptt_ckpt.costs import Costs, Curve
from tbptt_ckpt.window_plans.corrections import ROUNDING_BYTES, TOLERANCE

CHECKED_STEPS = 8  # bytes become a straight line by then


def at_least(given: Costs, measured: Costs, most_steps: int) -> Costs:
    """Given costs, raised where short segments took more bytes; seconds stay as they were given.

    Args:
        given: What is believed where it is enough.
        measured: From segments of up to `CHECKED_STEPS` steps.
        most_steps: The longest window.
    """
    last, found_last = given.last_leaf_bytes, measured.last_leaf_bytes
    fixed, found = given.fixed, measured.fixed
    return replace(
        given,
        state_bytes=max(given.state_bytes, measured.state_bytes),
        ambient_bytes=max(given.ambient_bytes, measured.ambient_bytes),
        leaf_bytes=_higher(given.leaf_bytes, measured.leaf_bytes, most_steps),
        last_leaf_bytes=last and found_last and _higher(last, found_last, most_steps),
        advance_bytes=_higher(given.advance_bytes, measured.advance_bytes, most_steps),
        update_bytes=max(given.update_bytes, measured.update_bytes),
        fixed=replace(
            fixed,
            gradients=max(fixed.gradients, found.gradients),
            optimizer=max(fixed.optimizer, found.optimizer),
        ),
    )


def _higher(given: Curve, measured: Curve, most_steps: int) -> Curve:
    """The given curve where it is not below the measured one, otherwise the higher of the two."""
    checked = range(1, min(CHECKED_STEPS, most_steps) + 1)
    if all(measured(n) <= (1 + TOLERANCE) * given(n) + ROUNDING_BYTES for n in checked):
        return given
    lengths = {most_steps, *(steps for steps, _ in (*given.points, *measured.points))}
    return Curve.through((steps, max(given(steps), measured(steps))) for steps in lengths)
