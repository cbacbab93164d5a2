"""What a module costs in bytes and seconds: measured once, or written by hand."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tbptt_ckpt.errors import ArgumentError


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
        points = tuple((int(steps), float(value)) for steps, value in self.points)
        object.__setattr__(self, "points", points)
        steps, values = [p[0] for p in points], [p[1] for p in points]
        if not points or steps[0] < 0 or any(b <= a for a, b in pairwise(steps)):
            raise ArgumentError(f"points={points!r} must be (steps, value) with growing steps")
        falls = any(b < a for a, b in pairwise(values))
        if falls or not all(0 <= value < math.inf for value in values):
            raise ArgumentError(f"points={points!r} must have finite values that do not fall")

    @classmethod
    def linear(cls, fixed: float, per_step: float) -> Curve:
        """`fixed + per_step * steps`."""
        return cls(((0, fixed), (1, fixed + per_step)))

    @classmethod
    def through(cls, points: Iterable[tuple[int, float]]) -> Curve:
        """Through measured points, each raised to the highest before it."""
        highest, rising = 0.0, []
        for steps, value in sorted(points):
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


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedBytes:
    """Device memory that is there whatever the schedule.

    Attributes:
        weights: Parameters and buffers.
        gradients: Their `.grad`.
        optimizer: Its state, also where the first step has yet to make it.
        states: The window's first state, the incoming state gradient, the states kept for
            later windows.
        step_inputs: Inputs and targets, for each step of a window.
        other: Anything else that is live.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    states: int = 0
    step_inputs: float = 0.0
    other: int = 0

    def total(self, window_steps: int) -> int:
        """All of it for a window of that many steps."""
        held = self.weights + self.gradients + self.optimizer + self.states + self.other
        return held + math.ceil(self.step_inputs * window_steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What a module costs.

    A leaf of L steps takes `leaf_bytes(L)` above the fixed part and the kept boundary
    states, and `leaf_seconds(L)` to run with a graph and differentiate. Advancing L steps in
    one call takes `advance_bytes(L)` and `advance_seconds(L)`.

    Attributes:
        state_bytes: One boundary state, with the generators and buffers kept with it.
        leaf_bytes: Peak of one leaf.
        leaf_seconds: Time of one leaf.
        advance_bytes: Peak of one call in an advance.
        advance_seconds: Time of one call in an advance.
        last_leaf_bytes: Peak of the leaf that is last in time, which runs before gradients
            exist; None where it takes `leaf_bytes` too. Counted above the same fixed part,
            the gradients included.
        update_bytes: Peak of the update of the weights above the fixed part.
        fixed: What is there in any case.
        host_step_bytes: Host memory besides tensors for each step of a leaf.
        host_state_bytes: The same for each kept boundary state.
        ambient_bytes: Of `state_bytes`, the generators and buffers that steps change; they are
            also kept at each update point within reach.
    """

    state_bytes: int
    leaf_bytes: Curve
    leaf_seconds: Curve
    advance_bytes: Curve
    advance_seconds: Curve
    last_leaf_bytes: Curve | None = None
    update_bytes: int = 0
    fixed: FixedBytes = FixedBytes()
    host_step_bytes: float = 0.0
    host_state_bytes: float = 0.0
    ambient_bytes: int = 0

    @classmethod
    def linear(
        cls,
        *,
        state_bytes: int,
        step_bytes: float,
        leaf_bytes: float = 0.0,
        step_seconds: float = 1.0,
        call_seconds: float = 0.0,
        backward_ratio: float = 2.0,
    ) -> Costs:
        """Costs by hand: straight lines.

        Args:
            state_bytes: One boundary state.
            step_bytes: Each step of a leaf.
            leaf_bytes: A leaf in addition, whatever its length.
            step_seconds: Running one step without a graph.
            call_seconds: Each call in addition, of an advance or a leaf.
            backward_ratio: Time of differentiating a step over that of running it.
        """
        leaf_step_seconds = step_seconds * (1 + backward_ratio)
        return cls(
            state_bytes=state_bytes,
            leaf_bytes=Curve.linear(leaf_bytes, step_bytes),
            leaf_seconds=Curve.linear(call_seconds, leaf_step_seconds),
            advance_bytes=Curve.linear(0, 0),
            advance_seconds=Curve.linear(call_seconds, step_seconds),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        plain: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Curve):
                value = [list(point) for point in value.points]
            elif isinstance(value, FixedBytes):
                value = {part.name: getattr(value, part.name) for part in fields(value)}
            plain[field.name] = value
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Costs:
        """The costs that `to_dict` wrote.

        Raises:
            ArgumentError: Names that costs do not have, or that are missing.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(plain) - known)
        if unknown:
            raise ArgumentError(f"costs have no {', '.join(unknown)}; known: {sorted(known)}")
        try:
            return cls(**{name: _parsed(name, value) for name, value in plain.items()})
        except TypeError as error:
            raise ArgumentError(f"costs cannot be read: {error}") from error


def _parsed(name: str, value: Any) -> Any:
    if name == "fixed":
        return FixedBytes(**value)
    if isinstance(value, list | tuple):
        return Curve(tuple((int(steps), float(y)) for steps, y in value))
    return value
