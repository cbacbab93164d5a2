"""Leaves of blocks of steps, and steps that are left of a block, which run one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tbptt_ckpt.budget.samples import QuietSample, SegmentBytes
from tbptt_ckpt.schedule.costs import Costs
from tbptt_ckpt.schedule.curves import Curve

Rest = tuple[SegmentBytes, QuietSample | None]  # with losses and without


def with_rests(costs: Costs, rests: Sequence[Rest]) -> Costs:
    """Costs of leaves of whole blocks, raised to what leaves took of which a block misses a step.

    A rest takes as much after any number of blocks.
    """
    loud, quiet = [each for each, _ in rests], [each for _, each in rests if each is not None]
    last, without = costs.last_leaf_bytes, costs.quiet
    if without is not None:
        without = replace(
            without,
            leaf=_raised(without.leaf, [(s.steps, s.leaf.most) for s in quiet]),
            advance=_raised(without.advance, [(s.steps, s.advance) for s in quiet]),
            graph=without.graph and _raised(without.graph, [(s.steps, s.graph) for s in quiet]),
        )
    return replace(
        costs,
        leaf_bytes=_raised(costs.leaf_bytes, [(s.steps, s.leaf.most) for s in loud]),
        last_leaf_bytes=last
        and _raised(last, [(s.steps, s.last_leaf_beside_gradients.most) for s in loud]),
        advance_bytes=_raised(costs.advance_bytes, [(s.steps, s.advance) for s in loud]),
        quiet=without,
    )


def _raised(curve: Curve, samples: Sequence[tuple[int, int]]) -> Curve:
    """A curve that says no less at some lengths, and from the first of them on so much more."""
    more = max((taken - curve(steps) for steps, taken in samples), default=0.0)
    if more <= 0.0:
        return curve
    first = min(steps for steps, _ in samples)
    return Curve.through((n, value + more * (n >= first)) for n, value in curve.points)
