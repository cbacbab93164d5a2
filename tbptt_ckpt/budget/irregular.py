"""Steps that make a leaf take more: lanes begin a sequence or are left out, segments are cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from tbptt_ckpt.budget.window_budget import Cuts, Request
from tbptt_ckpt.schedule.actions import Differentiate
from tbptt_ckpt.schedule.curves import Curve
from tbptt_ckpt.schedule.plan import Plan

_SURELY = 0.9  # of what shorter pieces spare: no measured length was cut in every way


class IrregularSteps:
    """How many irregular steps leaves of some length have, and how long their pieces are.

    Every irregular step takes more; but a segment that is cut is differentiated piece by piece,
    so that what the backward of a longer one would take is never needed.
    """

    def __init__(self) -> None:
        # By length: the most irregular steps of a leaf in a window, and the longest uncut piece of
        # that window; windows that have no more of either are left out.
        self._found: dict[int, dict[int, int]] = {}
        self._uncut = 0  # steps of the longest window that had none

    def take(
        self,
        steps: Iterable[int],
        cuts: Iterable[int],
        window: tuple[int, int],
        resets: Iterable[int] = (),
    ) -> bool:
        """Take in a window's irregular steps, and where else segments are cut.

        Args:
            steps: The irregular steps.
            cuts: The other cuts.
            window: Its first step and its end.
            resets: Of the irregular steps, those before which segments are cut as well.

        Returns:
            Whether there is more of them, or less cut, than in any window before.
        """
        (first, stop), steps, cuts = window, {*steps}, {*cuts}
        if not steps and not cuts:
            grows = stop - first > self._uncut and bool(self._found)
            self._uncut = max(self._uncut, stop - first)
            return grows
        edges = [first, *sorted({*cuts, *resets}), stop]
        piece = max(after - before for before, after in pairwise(edges))
        # A cut before a leaf's first step is none of its own: it lies between two steps.
        at, is_new = np.array(sorted({*steps, *(cut - 0.5 for cut in cuts)})), False
        begins = np.floor(at)
        for length in _lengths(stop - first):
            ends = np.searchsorted(at, begins + length - 1, "right")
            most = int((ends - np.searchsorted(at, begins, "left")).max())
            known, longest = self._found.setdefault(length, {}), min(piece, length)
            if any(more >= most and other >= longest for more, other in known.items()):
                continue
            is_new = True
            for more in [n for n, other in known.items() if n <= most and other <= longest]:
                del known[more]
            known[most] = longest
        return is_new

    def added(self, curve: Curve, more: Curve | None, spared: Callable[[int], float]) -> Curve:
        """Bytes of leaves that hold what takes most of what was found.

        Args:
            curve: Bytes of leaves without irregular steps.
            more: What so many of them take; None for nothing.
            spared: Of a leaf's bytes, those that only its longest piece needs.
        """
        lengths = sorted(self._found)
        if more is None or not lengths:
            return curve
        pieces = {piece for found in self._found.values() for piece in found.values()}
        after = {length + 1 for length in lengths[:-1]}  # up to the next one as much as there
        points = []
        for steps in sorted({*lengths, *after, *pieces, *(steps for steps, _ in curve.points)}):
            found = self._found[next((n for n in lengths if n >= steps), lengths[-1])]
            taken = [0.0] if steps <= self._uncut else []
            for most, piece in found.items():
                less = _SURELY * max(0.0, spared(steps) - spared(min(steps, piece)))
                taken.append((more(most) if most else 0.0) - less)
            points.append((steps, curve(steps) + max(taken)))
        return Curve.through(points)

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        found = [[length, [*map(list, most.items())]] for length, most in self._found.items()]
        return {"found": found, "uncut": self._uncut}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with these."""
        self._found = {length: dict(most) for length, most in state["found"]}
        self._uncut = state["uncut"]


def _lengths(longest: int) -> list[int]:
    """1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, ... and the longest."""
    found = {longest, *(n << power for n in range(4, 8) for power in range(longest.bit_length()))}
    return sorted(length for length in {1, 2, 3, *found} if length <= longest)


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
