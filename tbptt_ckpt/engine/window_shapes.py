"""What a window looks like to who plans it: its own shape, and that of the largest to come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tbptt_ckpt.budget.window_budget import Shape, fullest_window, shape_of
from tbptt_ckpt.engine.options import Options
from tbptt_ckpt.engine.reach_rule import audited_steps, later_of_audit, reach_sizes
from tbptt_ckpt.engine.records import Records
from tbptt_ckpt.schedule.truncation import Draw
from tbptt_ckpt.schedule.windows import (
    Window,
    joint_steps,
    next_point,
    points_after,
    recorded_steps,
)


def shapes_of(
    options: Options, draw: Draw, num_steps: int | None, records: Records, joints: Sequence[int]
) -> tuple[Shape, Shape, int]:
    """The shapes, and how many generators and buffers the largest finds noted beside those now.

    Args:
        options: What the user asked for.
        draw: The window, and how far it goes back.
        num_steps: Of the sequence; None where it is not known yet.
        records: What earlier windows left.
        joints: Steps at which it restarts from a state that is there.
    """
    window, k1, k2, is_stale = draw.whole, options.k1, options.most_k2, options.is_stale
    if options.is_auto:
        fullest, passed = _largest_of_auto(options, window, num_steps)
        shape = _auto_shape(draw.window, joints, draw.later, len(records.boundaries))
        return shape, fullest, max(0, passed - len(records.ambients))
    shape = fullest = replace(
        shape_of(window, num_steps, k1, k2, stale=is_stale),
        recorded_states=len(records.boundaries),  # more after windows without a loss
    )
    passed = len(records.ambients)
    if (most := fullest_window(window, num_steps, k1, k2)) != window:
        reach = k2 if most.stop - most.start == k2 else None
        fullest = shape_of(most, None, k1, reach, stale=is_stale)
        passed = len(recorded_steps(most, None, k1, reach, stale=True))
    if options.parsed_truncation() and not is_stale:  # others have a lead's last state
        shape, fullest = shape.with_states(1), fullest.with_states(1)
    coming = max(0, passed - len(records.ambients))
    return shape.reaching(draw.window, joints), fullest, coming


def _largest_of_auto(options: Options, window: Window, num_steps: int | None) -> tuple[Shape, int]:
    """That of an audit, where the sequence has room for one, and the update points inside."""
    k1, k2 = options.k1, options.most_k2
    assert k2 is not None, "options have been checked"
    most = fullest_window(window, num_steps, k1, k2)
    joints: Sequence[int] = joint_steps(most, k1) if options.is_stale else ()
    later: Sequence[int] = () if options.is_stale else (most.start + k1,)
    if (point := next_point(most.stop, k1)) >= k2 and not options.is_stale:
        joints = audited_steps(point, reach_sizes(k1, k2))
        later = later_of_audit(joints, most.start, k1)
    points = 1 + len(points_after(most.start, most.new_start + 1, k1))
    return _auto_shape(most, joints, later, points), points


def _auto_shape(
    window: Window, joints: Sequence[int], later: Sequence[int], recorded_states: int
) -> Shape:
    """States are recorded at all update points, and noted anew where the next window may begin."""
    again = [step for step in later if window.start < step <= window.new_start]
    return Shape(
        num_steps=window.stop - window.start,
        new_steps=window.num_new_steps,
        joints=tuple(joint - window.start for joint in joints),
        recorded_states=recorded_states,
        coming_states=2 + len(again),
    )
