"""Curves: what so many steps take, from a few measured lengths to all others."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from tbptt_ckpt.arguments import checked
from tbptt_ckpt.errors import ArgumentError, shown

_NEVER = 1 << 40  # steps
_STRAIGHT_FROM = 3  # steps
_WIGGLE, _WIGGLE_BYTES = 0.02, 32 * 1024  # deviations that count as rounding
_MOST_SLOWER = 1.6  # time per step of long runs, whose graph leaves the caches, over short ones
_LEAST_SLOPE = 0.3  # of the time per step between the longest samples, over the mean


@dataclass(frozen=True, slots=True)
class Curve:
    """A measured function of a number of steps: straight between points and beyond the last.

    Left of the first point it follows the line through the first two. It never falls.

    Attributes:
        points: (steps, value), by steps; one point stands for a constant.

    Raises:
        ArgumentError: No points, or points that are not in order, negative or falling.
    """

    points: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        points = tuple(_pairs(self.points))
        object.__setattr__(self, "points", points)
        steps, values = [p[0] for p in points], [p[1] for p in points]
        if not points or steps[0] < 0 or any(b <= a for a, b in pairwise(steps)):
            raise ArgumentError(f"points={shown(points)} must be (steps, value) with growing steps")
        falls = any(b < a for a, b in pairwise(values))
        if falls or not all(0 <= value < math.inf for value in values):
            raise ArgumentError(f"points={shown(points)} must have finite values that do not fall")

    @classmethod
    @checked
    def linear(cls, fixed: float, per_step: float) -> Curve:
        """`fixed + per_step * steps`."""
        return cls(((0, fixed), (1, fixed + per_step)))

    @classmethod
    def through(cls, points: Iterable[tuple[int, float]]) -> Curve:
        """Through measured points, each raised to the highest before it."""
        highest, rising = 0.0, []
        for steps, value in sorted(_pairs(points)):
            highest = max(highest, value)
            rising.append((steps, highest))
        return cls(tuple(rising))

    @property
    def slope(self) -> float:
        """Growth per step beyond the last point."""
        if len(self.points) == 1:
            return 0.0
        (x0, y0), (x1, y1) = self.points[-2:]
        return (y1 - y0) / (x1 - x0)

    def plus(self, per_step: float) -> Curve:
        """The curve with so much more for each step."""
        return Curve(tuple((steps, value + per_step * steps) for steps, value in self.points))

    def raised_by(self, constant: float) -> Curve:
        """The curve with so much more at every number of steps."""
        return Curve(tuple((steps, value + constant) for steps, value in self.points))

    def of_blocks(self, steps: int) -> Curve:
        """The same of so many blocks, of so many steps each."""
        if len(self.points) == 1:
            return self
        counts = {at for each, _ in self.points for at in (each // steps, -(-each // steps))}
        counts.add(max(counts) + 1)
        return Curve.through((count, self(count * steps)) for count in counts)

    def bends(self, below: int) -> list[int]:
        """The numbers of steps of its points, below the given one."""
        return [steps for steps, _ in self.points if 0 < steps < below]

    def __call__(self, steps: int) -> float:
        """The value at a number of steps, never negative."""
        if len(self.points) == 1:
            return self.points[0][1]
        right = bisect_left(self.points, (steps, -math.inf))
        right = min(max(right, 1), len(self.points) - 1)
        (x0, y0), (x1, y1) = self.points[right - 1], self.points[right]
        return max(0.0, y0 + (y1 - y0) * (steps - x0) / (x1 - x0))

    def at(self, steps: NDArray[np.int64]) -> NDArray[np.float64]:
        """The values at many numbers of steps."""
        distinct, where = np.unique(steps, return_inverse=True)
        return np.array([self(n) for n in distinct.tolist()], np.float64)[where]

    def longest(self, limit: float) -> float:
        """Most steps whose value is at most `limit`; infinity where there is no bound.

        -1 where not even zero steps fit.
        """
        if self(0) > limit:
            return -1
        at = bisect_right([value for _, value in self.points], limit)
        if at == len(self.points) and self.slope == 0.0:
            return math.inf
        if len(self.points) == 1:
            return math.inf
        left = min(max(at - 1, 0), len(self.points) - 2)
        (x0, y0), (x1, y1) = self.points[left], self.points[left + 1]
        guess = math.floor(x0 + (limit - y0) * (x1 - x0) / (y1 - y0)) if y1 > y0 else x1
        while self(guess) > limit:  # a rounding error away at most
            guess -= 1
        while self(guess + 1) <= limit:
            guess += 1
        return guess


def _pairs(points: Iterable[tuple[int, float]]) -> list[tuple[int, float]]:
    try:
        return [(int(steps), float(value)) for steps, value in points]
    except Exception as error:
        raise ArgumentError(f"points={shown(points)} must be pairs (steps, value)") from error


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


def higher(some: Curve, other: Curve, *lengths: int) -> Curve:
    """The higher of two curves at the points of both, at further lengths, and beyond them all."""
    known = {*lengths, *(steps for steps, _ in (*some.points, *other.points))}
    last = max(known)
    low, high = sorted((some, other), key=lambda curve: curve(last))
    if low.slope > high.slope:  # it overtakes
        crossing = last + (high(last) - low(last)) / (low.slope - high.slope)
        if crossing < _NEVER:
            known |= {math.floor(crossing), math.ceil(crossing), math.ceil(crossing) + 1}
    return Curve.through((steps, max(some(steps), other(steps))) for steps in known)


def bounding_curve(samples: Iterable[tuple[int, int]]) -> Curve:
    """A curve through samples, or slightly above those that wiggle around a straight line.

    What lies between the samples wiggles too, and must not take more than the curve says.
    """
    exact = Curve.through(samples)
    hull: list[tuple[int, float]] = []
    for point in exact.points:
        while len(hull) > 1 and hull[-2][0] >= _STRAIGHT_FROM:
            (x0, y0), (x1, y1), (x2, y2) = *hull[-2:], point
            if (y1 - y0) * (x2 - x0) > (y2 - y0) * (x1 - x0):  # above the line past it
                break
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
