"""Costs that are believed, raised to what was measured since."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from tbptt_ckpt.schedule.costs import Costs, QuietBytes
from tbptt_ckpt.schedule.curves import Curve, higher

# Predictions above a measurement by less than this are left alone; none may be below it.
TOLERANCE = 0.03
ROUNDING_BYTES = 1024  # losses and other numbers

CHECKED_STEPS = 8  # bytes become a straight line by then


def at_least(given: Costs, measured: Costs, most_steps: int) -> Costs:
    """Given costs, raised where segments of up to `CHECKED_STEPS` steps took more bytes.

    Seconds stay as they were given; the longest window has `most_steps`.
    """

    def checked(curve: Curve, found: Curve) -> Curve:
        """The given curve where it is not below the measured one, otherwise the higher one."""
        lengths = range(1, min(CHECKED_STEPS, most_steps) + 1)
        if all(found(n) <= (1 + TOLERANCE) * curve(n) + ROUNDING_BYTES for n in lengths):
            return curve
        return higher(curve, found, most_steps)

    fixed, found = given.fixed, measured.fixed
    return replace(
        _leaves_joined(given, measured, checked),
        state_bytes=max(given.state_bytes, measured.state_bytes),
        ambient_bytes=max(given.ambient_bytes, measured.ambient_bytes),
        handed_on_bytes=max(given.handed_on_bytes, measured.handed_on_bytes),
        advance_bytes=checked(given.advance_bytes, measured.advance_bytes),
        update_bytes=max(given.update_bytes, measured.update_bytes),
        irregular_bytes=_higher(given.irregular_bytes, measured.irregular_bytes),
        weighed_step_bytes=max(given.weighed_step_bytes, measured.weighed_step_bytes),
        fixed=replace(
            fixed,
            gradients=max(fixed.gradients, found.gradients),
            optimizer=max(fixed.optimizer, found.optimizer),
        ),
    )


def _higher(some: Curve | None, other: Curve | None) -> Curve | None:
    return higher(some, other) if some and other else some or other


def not_below(costs: Costs, measured: Costs | None) -> Costs:
    """Costs whose leaves take no less than they did when segments of all lengths were measured."""
    return costs if measured is None else _leaves_joined(costs, measured, higher)


def _leaves_joined(some: Costs, other: Costs, join: Callable[[Curve, Curve], Curve]) -> Costs:
    """Costs with the curves of leaves joined; a kind that either does not know is left out."""

    def both(one: Curve | None, two: Curve | None) -> Curve | None:
        return one and two and join(one, two)

    quiet, other_quiet = some.quiet, other.quiet
    return replace(
        some,
        leaf_bytes=join(some.leaf_bytes, other.leaf_bytes),
        last_leaf_bytes=both(some.last_leaf_bytes, other.last_leaf_bytes),
        quiet=quiet
        and other_quiet
        and QuietBytes(
            leaf=join(quiet.leaf, other_quiet.leaf),
            advance=join(quiet.advance, other_quiet.advance),
            graph=both(quiet.graph, other_quiet.graph),
            joined=both(quiet.joined, other_quiet.joined),
            last_joined=both(quiet.last_joined, other_quiet.last_joined),
            irregular=_higher(quiet.irregular, other_quiet.irregular),
        ),
    )


def with_host_bytes(costs: Costs) -> Costs:
    """The costs with what a leaf and a state take on the host besides tensors."""

    def added(curve: Curve) -> Curve:
        return curve.plus(costs.host_step_bytes)

    host_bytes, kept_bytes = math.ceil(costs.host_state_bytes), costs.kept_bytes
    return replace(
        costs.with_leaves(added, added),
        state_bytes=costs.state_bytes + host_bytes,
        kept_bytes=None if kept_bytes is None else kept_bytes + host_bytes,
    )
