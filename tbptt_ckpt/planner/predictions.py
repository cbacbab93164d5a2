"""Bytes and seconds of a nesting, worked out node by node without writing its actions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

from tbptt_ckpt.schedule.costs import Costs, Curve
from tbptt_ckpt.schedule.nesting import Nesting


@dataclass(frozen=True, slots=True)
class Prediction:
    """What running a stretch takes.

    Attributes:
        peak_bytes: Above what is there anyway.
        seconds: Time.
    """

    peak_bytes: int
    seconds: float


def leaf_curve(costs: Costs, *, is_last: bool) -> Curve:
    """Bytes of a leaf; `is_last` for the one that is differentiated first in a window."""
    if is_last and costs.last_leaf_bytes is not None:
        return costs.last_leaf_bytes
    return costs.leaf_bytes


def advance_seconds(costs: Costs, steps: int, advance_steps: int) -> float:
    """Time to advance, in calls of at most `advance_steps`."""
    calls, rest = divmod(steps, advance_steps)
    seconds = calls * costs.advance_seconds(advance_steps) if calls else 0.0
    return seconds + (costs.advance_seconds(rest) if rest else 0.0)


def advance_peak(costs: Costs, steps: int, advance_steps: int) -> int:
    """Bytes of an advance beside the states kept at the moment."""
    return math.ceil(costs.advance_bytes(min(steps, advance_steps)))


def predict(nesting: Nesting, costs: Costs, advance_steps: int, *, is_last: bool) -> Prediction:
    """What a stretch takes whose first state is given.

    Args:
        nesting: The stretch.
        costs: What its steps take.
        advance_steps: Most steps of one call in an advance.
        is_last: Whether the window ends with it, so that its last leaf runs before
            gradients exist.
    """
    peaks = _node_peaks(nesting, costs, advance_steps)
    seconds = _node_seconds(nesting, costs, advance_steps)
    peak = _peak_at_the_end(nesting, costs, advance_steps, peaks) if is_last else peaks[-1]
    return Prediction(peak, seconds[-1])


def _node_peaks(nesting: Nesting, costs: Costs, advance_steps: int) -> list[int]:
    peaks: list[int] = []
    advance = _peaks_of_advances(costs, advance_steps)
    state_bytes, steps = costs.state_bytes, nesting.node_steps
    for head, repeats, tail in nesting.nodes:
        if not repeats:
            peaks.append(math.ceil(costs.leaf_bytes(head)))
            continue
        # Of the equal segments the last has the most states beside it.
        before = (repeats - 1) * state_bytes + max(advance(steps[head]), peaks[head])
        peaks.append(max(before, repeats * state_bytes + peaks[tail]))
    return peaks


def _peaks_of_advances(costs: Costs, advance_steps: int) -> Callable[[int], int]:
    """`advance_peak` by steps, each looked up once."""
    known = cache(partial(advance_peak, costs, advance_steps=advance_steps))
    return lambda steps: known(min(steps, advance_steps))


def _times_of_advances(costs: Costs, advance_steps: int) -> Callable[[int], float]:
    """`advance_seconds` by steps, each call looked up once."""
    whole, part = costs.advance_seconds(advance_steps), cache(costs.advance_seconds)

    def seconds(steps: int) -> float:
        calls, rest = divmod(steps, advance_steps)
        return calls * whole + (part(rest) if rest else 0.0)

    return seconds


def _peak_at_the_end(
    nesting: Nesting, costs: Costs, advance_steps: int, peaks: Sequence[int]
) -> int:
    """The same where the last leaf has costs of its own."""
    node, states, peak = len(nesting.nodes) - 1, 0, 0
    advance = _peaks_of_advances(costs, advance_steps)
    while True:
        head, repeats, tail = nesting.nodes[node]
        kept_bytes = states * costs.state_bytes
        if not repeats:
            curve = leaf_curve(costs, is_last=True)
            return max(peak, kept_bytes + math.ceil(curve(head)))
        before = max(advance(nesting.node_steps[head]), peaks[head])
        peak = max(peak, kept_bytes + (repeats - 1) * costs.state_bytes + before)
        node, states = tail, states + repeats


def _node_seconds(nesting: Nesting, costs: Costs, advance_steps: int) -> list[float]:
    seconds: list[float] = []
    advance, steps = _times_of_advances(costs, advance_steps), nesting.node_steps
    for head, repeats, tail in nesting.nodes:
        if not repeats:
            seconds.append(costs.leaf_seconds(head))
            continue
        seconds.append(repeats * (advance(steps[head]) + seconds[head]) + seconds[tail])
    return seconds
