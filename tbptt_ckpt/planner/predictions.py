"""Bytes and seconds of a nesting, worked out node by node without writing its actions."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

from tbptt_ckpt.planner.feasibility import Stretch
from tbptt_ckpt.schedule.costs import Costs
from tbptt_ckpt.schedule.nesting import Nesting


@dataclass(frozen=True, slots=True)
class Prediction:
    """What running a stretch takes."""

    peak_bytes: int  # above what is there anyway
    seconds: float


def advance_seconds(costs: Costs, steps: int, advance_steps: int) -> float:
    """Time to advance, in calls of at most `advance_steps`."""
    calls, rest = divmod(steps, advance_steps)
    seconds = calls * costs.advance_seconds(advance_steps) if calls else 0.0
    return seconds + (costs.advance_seconds(rest) if rest else 0.0)


def predict(nesting: Nesting, costs: Costs, advance_steps: int, stretch: Stretch) -> Prediction:
    """What a stretch takes whose first state is given, in advances of at most so many steps."""
    return Prediction(
        _Peaks(nesting, costs, advance_steps).of(stretch),
        _seconds(nesting, costs, advance_steps),
    )


def in_longest_calls(
    usual: int, prediction: Callable[[int], Prediction], limit_bytes: float
) -> tuple[int, Prediction]:
    """The most steps of a call of an advance that fit, and what they give; else of the shortest."""
    found = prediction(usual)
    if found.peak_bytes <= limit_bytes:
        return usual, found

    def misses(advance_steps: int) -> bool:
        return prediction(advance_steps).peak_bytes > limit_bytes

    advance_steps = max(1, bisect_left(range(1, usual), True, key=misses))
    return advance_steps, prediction(advance_steps)


def losses_of_copies(count: int, steps: int, num_losses: int) -> Iterator[tuple[int, int]]:
    """(copies, losses of each) of equal neighbours of which the last steps have losses, last first.

    Copies without steps are left out.
    """
    full, rest = divmod(num_losses, steps)
    full = min(count, full)
    some = min(count - full, int(rest > 0))
    for copies, losses in ((full, steps), (some, rest), (count - full - some, 0)):
        if copies:
            yield copies, losses


class _Peaks:
    """The peaks of a nesting's nodes with losses at every step and at none, and of some others."""

    def __init__(self, nesting: Nesting, costs: Costs, advance_steps: int) -> None:
        self._nesting, self._costs, self._advance_steps = nesting, costs, advance_steps
        self._advance = cache(self._advance_peak)
        self._alike: dict[bool, list[int]] = {}

    def of(self, stretch: Stretch) -> int:
        """The peak of the whole."""
        nesting, state_bytes = self._nesting, self._costs.kept_state_bytes
        steps, peak = nesting.node_steps, 0
        # Along the way to the step where losses begin, and to the last leaf: (node, losses,
        # states beside it, whether the window ends with it).
        todo = [(len(nesting.nodes) - 1, stretch.num_losses, 0, stretch.is_last)]
        while todo:
            node, losses, states, is_last = todo.pop()
            head, repeats, tail = nesting.nodes[node]
            if not is_last and losses in (0, steps[node]):
                found = self._all_alike(losses > 0)[node]
            elif not repeats:
                found = self._costs.leaf_peak(head, losses, is_last=is_last)
            else:
                at_end = min(losses, steps[tail])
                todo.append((tail, at_end, states + repeats, is_last))
                found, left = 0, repeats
                for copies, each in losses_of_copies(repeats, steps[head], losses - at_end):
                    left -= copies  # of equal ones the last has the most states beside it
                    beside = states + left + copies - 1
                    todo.append((head, each, beside, False))
                    advance = self._advance(steps[head], each)
                    peak = max(peak, beside * state_bytes + advance)
            peak = max(peak, states * state_bytes + found)
        return peak

    def _all_alike(self, has_losses: bool) -> list[int]:
        """The peak of every node where all of its steps have losses, or none has."""
        peaks = self._alike.setdefault(has_losses, [])
        if peaks:
            return peaks
        state_bytes, steps = self._costs.kept_state_bytes, self._nesting.node_steps
        for head, repeats, tail in self._nesting.nodes:
            if not repeats:
                peaks.append(self._costs.leaf_peak(head, head * has_losses))
                continue
            longest = min(steps[head], self._advance_steps)  # each length is looked up once
            advance = self._advance(longest, longest * has_losses)
            before = (repeats - 1) * state_bytes + max(advance, peaks[head])
            peaks.append(max(before, repeats * state_bytes + peaks[tail]))
        return peaks

    def _advance_peak(self, steps: int, num_losses: int) -> int:
        return self._costs.advance_peak(steps, num_losses, self._advance_steps)


def _seconds(nesting: Nesting, costs: Costs, advance_steps: int) -> float:
    seconds: list[float] = []
    whole, part = costs.advance_seconds(advance_steps), cache(costs.advance_seconds)
    for head, repeats, tail in nesting.nodes:
        if not repeats:
            seconds.append(costs.leaf_seconds(head))
            continue
        calls, rest = divmod(nesting.node_steps[head], advance_steps)
        advance = calls * whole + (part(rest) if rest else 0.0)
        seconds.append(repeats * (advance + seconds[head]) + seconds[tail])
    return seconds[-1]
