"""Steps that make a leaf take more: lanes begin a sequence or are left out, segments are cut."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from tbptt_ckpt.budget.window_budget import Cuts, Request
from tbptt_ckpt.schedule.actions import Differentiate
from tbptt_ckpt.schedule.curves import Curve
from tbptt_ckpt.schedule.plan import Plan


class IrregularSteps:
    """How many irregular steps a leaf of some length has, at most in all windows so far."""

    def __init__(self) -> None:
        self._most: dict[int, int] = {}

    def take(self, steps: Iterable[int], cuts: Iterable[int], window_steps: int) -> bool:
        """Take in a window's irregular steps, and where else segments are cut.

        Returns:
            Whether they are denser than any before.
        """
        # A cut before a leaf's first step is none of its own: it lies between two steps.
        at, before = np.array(sorted({*steps, *(cut - 0.5 for cut in cuts)})), dict(self._most)
        first = np.floor(at)
        for length in _lengths(window_steps) if len(at) else ():
            stop = np.searchsorted(at, first + length - 1, "right")
            within = stop - np.searchsorted(at, first, "left")
            self._most[length] = max(self._most.get(length, 0), int(within.max()))
        return self._most != before

    def added(self, curve: Curve, more: Curve | None) -> Curve:
        """Bytes of leaves with what they take `more` that hold the most of them."""
        lengths = sorted(self._most)
        if more is None or not lengths:
            return curve
        points = []
        for steps in sorted({*lengths, *(steps for steps, _ in curve.points)}):
            # Up to the next length no leaf has more than one of that length.
            most = self._most[next((n for n in lengths if n > steps), lengths[-1])]
            points.append((steps, curve(steps) + (more(most) if most else 0.0)))
        return Curve.through(points)

    def state_dict(self) -> list[list[int]]:
        """Plain data."""
        return [list(pair) for pair in self._most.items()]

    def load_state_dict(self, state: list[list[int]]) -> None:
        """Go on with these."""
        self._most = {length: most for length, most in state}  # noqa: C416 - lists, not pairs


def _lengths(longest: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, ... and the longest."""
    powers = [2**power for power in range(longest.bit_length())]
    found = {*powers, *(3 * power for power in powers), longest}
    return sorted(length for length in found if length <= longest)


def cuts_within_leaves(plan: Plan, request: Request) -> Cuts:
    """Which cuts of segments leaves go on across; costs know the first loss of the last leaf."""
    leaves = [action for action in plan.schedule if isinstance(action, Differentiate)]
    known = request.window.stop, request.loss_start
    crossed = [
        cut
        for cut in request.cuts
        if any(leaf.start < cut < leaf.stop and (leaf.stop, cut) != known for leaf in leaves)
    ]
    if not crossed:
        return Cuts.NONE
    return Cuts.EARLY if max(crossed) <= request.loss_start else Cuts.ALL
