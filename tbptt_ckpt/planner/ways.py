"""How a stretch may be planned whose last steps alone have losses.

A search knows leaves by their length and depth, not by where they lie. So a stretch is planned
in two ways, and the faster plan taken: as if every step had a loss; and with all losses in the
last leaf, so that every other leaf is one without.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from tbptt_ckpt.schedule.costs import Costs, QuietBytes
from tbptt_ckpt.schedule.curves import Curve


@dataclass(frozen=True, slots=True)
class Stretch:
    """Steps that are planned together, from a given state.

    Attributes:
        steps: Their number.
        num_losses: How many of them, the last ones, have a loss.
        is_last: Whether the window ends with them.
    """

    steps: int
    num_losses: int
    is_last: bool


@dataclass(frozen=True, slots=True)
class Way:
    """One way to plan a stretch.

    Attributes:
        costs: By length alone.
        is_last: Whether the window ends with it.
        least_last: The fewest steps of its last leaf.
    """

    costs: Costs
    is_last: bool
    least_last: int = 1

    @property
    def last_bytes(self) -> Curve:
        """Bytes of its last leaf."""
        return self.costs.leaf_curve(is_last=self.is_last)


@lru_cache(maxsize=64)
def ways(stretch: Stretch, costs: Costs) -> tuple[Way, ...]:
    """The ways to plan a stretch; what either takes for a plan is never less than it takes."""
    quiet, is_last = costs.quiet, stretch.is_last
    everywhere = Way(replace(costs, quiet=None), is_last)
    if quiet is None or stretch.num_losses == stretch.steps:
        return (everywhere,)
    if stretch.num_losses == 0:
        return (Way(_quiet_before(quiet, quiet.leaf, costs), is_last),)
    if not is_last:
        return (everywhere,)
    last = _last_leaves(stretch, quiet, costs)
    return everywhere, Way(_quiet_before(quiet, last, costs), True, stretch.num_losses)


def _quiet_before(quiet: QuietBytes, last: Curve, costs: Costs) -> Costs:
    return replace(
        costs,
        leaf_bytes=quiet.leaf,
        last_leaf_bytes=last,
        advance_bytes=quiet.advance,
        quiet=None,
    )


def _last_leaves(stretch: Stretch, quiet: QuietBytes, costs: Costs) -> Curve:
    """Bytes of last leaves whose steps but `num_losses` have no loss; rounded up in between."""
    loud, num_losses = costs.leaf_curve(is_last=True), stretch.num_losses
    makes = costs.last_leaf_bytes is not None
    points = [(n, loud(n)) for n in {num_losses, *(p for p, _ in loud.points if p < num_losses)}]
    bends = {p for p, _ in (*(quiet.graph or quiet.leaf).points, *quiet.leaf.points)}
    bends |= {p - num_losses for p in bends}
    for without in (p for p in {*bends, 1, stretch.steps} if p > 0):
        peak = quiet.before_losses(without, num_losses, loud, makes_gradients=makes)
        points.append((num_losses + without, peak))
    return Curve.through(points)
