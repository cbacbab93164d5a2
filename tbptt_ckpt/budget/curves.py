"""Costs that somebody gave, held against a few short segments before a budget rests on them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from tbptt_ckpt.schedule.costs import Costs, Curve

_STRAIGHT_FROM = 3  # steps
_WIGGLE, _WIGGLE_BYTES = 0.02, 32 * 1024  # deviations that count as rounding
_MOST_SLOWER = 1.6  # time per step of long runs, whose graph leaves the caches, over short ones
_LEAST_SLOPE = 0.3  # of the time per step between the longest samples, over the mean


# Predictions above a measurement by less than this are left alone; none may be below it.
TOLERANCE = 0.03
ROUNDING_BYTES = 1024  # losses and other numbers


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
        leaf_bytes=_higher_where_checked(given.leaf_bytes, measured.leaf_bytes, most_steps),
        last_leaf_bytes=last and found_last and _higher_where_checked(last, found_last, most_steps),
        advance_bytes=_higher_where_checked(
            given.advance_bytes, measured.advance_bytes, most_steps
        ),
        update_bytes=max(given.update_bytes, measured.update_bytes),
        fixed=replace(
            fixed,
            gradients=max(fixed.gradients, found.gradients),
            optimizer=max(fixed.optimizer, found.optimizer),
        ),
    )


def _higher_where_checked(given: Curve, measured: Curve, most_steps: int) -> Curve:
    """The given curve where it is not below the measured one, otherwise the higher of the two."""
    checked = range(1, min(CHECKED_STEPS, most_steps) + 1)
    if all(measured(n) <= (1 + TOLERANCE) * given(n) + ROUNDING_BYTES for n in checked):
        return given
    lengths = {most_steps, *(steps for steps, _ in (*given.points, *measured.points))}
    return Curve.through((steps, max(given(steps), measured(steps))) for steps in lengths)


def bounding_curve(samples: Iterable[tuple[int, int]]) -> Curve:
    """A curve through samples, or slightly above those that wiggle around a straight line.

    What lies between the samples wiggles too, and must not take more than the curve says.
    """
    exact = Curve.through(samples)
    hull: list[tuple[int, float]] = []
    for point in exact.points:
        while len(hull) > 1 and hull[-2][0] >= _STRAIGHT_FROM and _is_below(hull, point):
            hull.pop()
        hull.append(point)
    above = Curve(tuple(hull))
    off = (above(steps) - value for steps, value in exact.points)
    allowed = (max(_WIGGLE_BYTES, _WIGGLE * value) for _, value in exact.points)
    if not all(d <= a for d, a in zip(off, allowed, strict=True)):
        return exact
    last, highest = exact.points[-1]
    beyond = highest + last * max(above.slope, exact.slope)
    return Curve((*hull, (2 * last, beyond)))


def seconds_curve(samples: Iterable[tuple[int, float]]) -> Curve:
    """A curve through times, which other work on the machine lengthens and never shortens."""
    points = sorted(samples)
    least, lowered = math.inf, list[tuple[int, float]]()
    for steps, seconds in reversed(points):
        least = min(least, seconds)
        lowered.append((steps, least))
    lowered.reverse()
    (x0, y0), (x1, y1) = ([(0, 0.0), *lowered])[-2:]
    if y1 - y0 < _LEAST_SLOPE * y1 * (x1 - x0) / x1:  # a disturbed sample, not a free step
        lowered = [(steps, min(y, y1 * steps / x1)) for steps, y in lowered]
    return Curve.through(_plausible(lowered))


def _plausible(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """No step of a longer run takes much more than one of a shorter run: caches do not do that."""
    best, kept = math.inf, list[tuple[int, float]]()
    for steps, seconds in points:
        seconds = min(seconds, _MOST_SLOWER * best * steps)
        best = min(best, seconds / steps)
        kept.append((steps, seconds))
    return kept


def _is_below(hull: list[tuple[int, float]], point: tuple[int, float]) -> bool:
    """Whether the hull's last point lies below the line from the one before it to `point`."""
    (x0, y0), (x1, y1), (x2, y2) = *hull[-2:], point
    return (y1 - y0) * (x2 - x0) <= (y2 - y0) * (x1 - x0)


def scaled(curve: Curve, factor: float) -> Curve:
    """A curve times a number."""
    if factor == 1.0:
        return curve
    return Curve(tuple((steps, factor * value) for steps, value in curve.points))


def raised(curve: Curve, samples: Mapping[int, int]) -> Curve:
    """A curve that also goes through samples above it."""
    if not samples:
        return curve
    return Curve.through({**dict(curve.points), **samples}.items())


def not_below(costs: Costs, measured: Costs | None) -> Costs:
    """Costs whose leaves take no less than they did when segments of all lengths were measured."""
    if measured is None:
        return costs
    last, measured_last = costs.last_leaf_bytes, measured.last_leaf_bytes
    return replace(
        costs,
        leaf_bytes=_higher(costs.leaf_bytes, measured.leaf_bytes),
        last_leaf_bytes=last and measured_last and _higher(last, measured_last),
    )


def _higher(some: Curve, other: Curve) -> Curve:
    lengths = {steps for steps, _ in (*some.points, *other.points)}
    return Curve.through((steps, max(some(steps), other(steps))) for steps in lengths)


def with_host_bytes(costs: Costs) -> Costs:
    """The costs with what a leaf and a state take on the host besides tensors."""

    def added(curve: Curve) -> Curve:
        per_step = costs.host_step_bytes
        return Curve(tuple((steps, value + per_step * steps) for steps, value in curve.points))

    return replace(
        costs,
        state_bytes=costs.state_bytes + math.ceil(costs.host_state_bytes),
        leaf_bytes=added(costs.leaf_bytes),
        last_leaf_bytes=costs.last_leaf_bytes and added(costs.last_leaf_bytes),
    )
