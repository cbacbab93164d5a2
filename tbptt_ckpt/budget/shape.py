"""What a window looks like to a planner, wherever it lies."""

from __future__ import annotations

from dataclasses import dataclass

from tbptt_ckpt.schedule.windows import Window


@dataclass(frozen=True, slots=True)
class Shape:
    """What a window looks like to a planner, wherever it lies.

    Attributes:
        num_steps: Steps to differentiate.
        new_steps: Steps that no window before has run.
        joints: Steps inside whose states are given, counted from the first differentiated.
        recorded_states: States that exist before it for it and later ones to start from.
        coming_states: States that it notes, and the gradient of one.
    """

    num_steps: int
    new_steps: int
    joints: tuple[int, ...]
    recorded_states: int
    coming_states: int

    @property
    def run_steps(self) -> int:
        """Steps that run at all."""
        return max(self.num_steps, self.new_steps)


def fullest_shape(
    shape: Shape, window: Window, num_steps: int | None, k1: int, k2: int | None, *, stale: bool
) -> Shape:
    """The shape of the largest window from this one on, as far as it can be known."""
    if window.stop == num_steps:
        return shape
    reach = num_steps if k2 is None else k2 if num_steps is None else min(k2, num_steps)
    steps = max(shape.num_steps, reach or 0)
    overlap = max(0, steps - k1)
    if not stale or not overlap:
        return Shape(steps, k1, (), 1 + bool(overlap), 2 + bool(overlap))
    first = steps % k1 or k1  # blocks are cut at update points, counted back from the end
    joints = tuple(range(first, overlap + 1, k1))
    starts = 0 if k2 is None or steps % k1 == 0 else -(-overlap // k1)
    return Shape(steps, k1, joints, 1 + len(joints) + starts, 3)
