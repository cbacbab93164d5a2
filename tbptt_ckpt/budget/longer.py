"""Leaves longer than any whose bytes were measured.

One is metered before a plan relies on it, or, where there is no room for that, taken to be as
steep as such a one may be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from tbptt_ckpt.budget.checked_costs import CHECKED_STEPS, ROUNDING_BYTES
from tbptt_ckpt.budget.measuring import measuring, settled_bytes
from tbptt_ckpt.budget.probe import SegmentProbe
from tbptt_ckpt.budget.samples import QuietSample, SegmentBytes
from tbptt_ckpt.schedule.costs import Costs
from tbptt_ckpt.schedule.curves import Curve, higher

_MOST_LONGER = 2  # than a measured leaf: what takes the square of its steps is caught in time
_LEAST_LONGER = 1.1
# A line beyond measured lengths, at most: what a backward adds for each step, which begins to count
# where it exceeds what the forward took, is about what a step keeps.
_STEEPER = 2.0
# A leaf that took no more than measured ones foretold stands for leaves so many times as long.
# One of fewer steps hides what grows faster but is less there.
_STANDS_FOR, _STANDS_FROM, _AS_FORETOLD = 8, 64, 1.01


@dataclass(frozen=True, slots=True)
class LongLeaf:
    """What a leaf took that is longer than those before it, with losses and without."""

    loud: SegmentBytes
    quiet: QuietSample | None  # None where a window has no longer one

    @classmethod
    def of(cls, probe: SegmentProbe, steps: int) -> LongLeaf:
        """Meter one; gradients, generators and buffers are left as they were."""
        with measuring(probe) as (own, _):
            is_whole = steps == own.num_steps
            loud = settled_bytes(own, steps)
            own.loss.learn_no_more()
            return cls(loud, None if is_whole else own.quiet_bytes_of(steps))

    def raise_costs(self, costs: Costs) -> Costs:
        """Costs of leaves and advances that take no less."""
        loud, last, quiet = self.loud, costs.last_leaf_bytes, costs.quiet

        def raised(curve: Curve, taken: float) -> Curve:
            return _raised(curve, loud.steps, taken)

        if quiet and self.quiet:
            graph, joined, last_joined = quiet.graph, quiet.joined, quiet.last_joined
            found = self.quiet.joined
            quiet = replace(
                quiet,
                leaf=raised(quiet.leaf, self.quiet.leaf.most),
                graph=graph and raised(graph, self.quiet.graph),
                advance=raised(quiet.advance, self.quiet.advance),
                joined=raised(joined, found.leaf) if joined and found else joined,
                last_joined=raised(last_joined, found.last_leaf)
                if last_joined and found
                else last_joined,
            )
        return replace(
            costs,
            leaf_bytes=raised(costs.leaf_bytes, loud.leaf.most),
            last_leaf_bytes=last and raised(last, loud.last_leaf_beside_gradients.most),
            advance_bytes=raised(costs.advance_bytes, loud.advance),
            quiet=quiet,
            metered_steps=max(costs.metered_steps, loud.steps),
        )

    def stands_for(self, costs: Costs) -> int:
        """Up to how many steps leaves take what costs say, which were made without this one."""
        steps, raised = self.loud.steps, self.raise_costs(costs)
        pairs = zip(_curves(raised), _curves(costs), strict=True)
        is_foretold = all(
            found(steps) <= _AS_FORETOLD * said(steps) + ROUNDING_BYTES for found, said in pairs
        )
        return steps * (_STANDS_FOR if is_foretold and steps >= _STANDS_FROM else 1)


def length_to_meter(costs: Costs, planned: int, available: int, room_bytes: float) -> int | None:
    """A leaf on the way to a planned one, of as many steps as certainly fit; None if none does.

    Where a planned leaf is hardly longer than metered ones, one beyond it, if the window has it:
    each that is metered is longer by a tenth, or all that there is.

    Args:
        costs: What is known of shorter leaves.
        planned: Steps of the planned leaf.
        available: Steps of the window.
        room_bytes: What it may take.
    """
    metered = costs.metered_steps or CHECKED_STEPS
    anew = 2 * costs.fixed.gradients + 2 * costs.state_bytes  # once more in joined pieces
    known = anew + max(curve(metered) for curve in _curves(costs))
    per_step = _STEEPER * max(curve.slope for curve in _curves(costs))
    fitting = metered + (room_bytes - known) / max(1.0, per_step)
    wanted = min(max(planned, math.ceil(_LEAST_LONGER * metered)), available)
    steps = int(min(wanted, _MOST_LONGER * metered, fitting))
    return steps if steps >= min(planned, _LEAST_LONGER * metered) else None


def as_steep_as_may_be(costs: Costs) -> Costs:
    """Costs of leaves longer than metered ones at their most, for plans that have to do with it."""
    metered = costs.metered_steps or CHECKED_STEPS

    def steeper(curve: Curve) -> Curve:
        known, taken = [p for p in curve.points if p[0] < metered], curve(metered)
        most = taken + _STEEPER * curve.slope * metered
        return higher(Curve.through([*known, (metered, taken), (2 * metered, most)]), curve)

    return costs.with_leaves(steeper, steeper)


def _curves(costs: Costs) -> list[Curve]:
    quiet = costs.quiet
    found = [costs.leaf_bytes, costs.leaf_curve(is_last=True), costs.advance_bytes]
    if quiet is not None:
        others = (quiet.graph, quiet.joined, quiet.last_joined)
        found += [quiet.leaf, quiet.advance, *(curve for curve in others if curve is not None)]
    return found


def _raised(curve: Curve, steps: int, taken: float) -> Curve:
    """A curve that says no less at one length, and beyond it follows what it says by then."""
    if taken <= curve(steps):
        return curve
    shorter = [point for point in curve.points if point[0] < steps]
    return higher(Curve.through([*shorter, (steps, taken)]), curve)
