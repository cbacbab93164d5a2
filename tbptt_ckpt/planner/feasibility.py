"""What a window asks for, whether a budget can meet it at all, and what would do instead.

A search knows leaves by their length and depth, not by where they lie. So a stretch whose last
steps alone have losses is planned in two ways, and the faster plan taken: as if every step had
a loss; and with all losses in the last leaf, so that every other leaf is one without.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import lru_cache

from tbptt_ckpt.schedule.costs import Costs, QuietBytes
from tbptt_ckpt.schedule.curves import Curve

_DIGITS = 10  # of budgets that plans are made for


@dataclass(frozen=True, slots=True)
class Stretch:
    """Steps that are planned together, from a given state."""

    steps: int  # their number
    num_losses: int  # how many of them, the last ones, have a loss
    is_last: bool  # whether the window ends with them


@dataclass(frozen=True, slots=True)
class Way:
    """One way to plan a stretch."""

    costs: Costs  # by length alone
    is_last: bool  # whether the window ends with it
    least_last: int = 1  # the fewest steps of its last leaf

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


@dataclass(frozen=True, slots=True)
class Demand:
    """What a window asks for."""

    # Steps of its blocks in time order; all but a first one after a lead start from given states.
    lengths: tuple[int, ...]
    # Steps that no window before has run, which alone have losses. Where there are more of them
    # than steps to differentiate, the first ones only advance; None where all steps have losses
    # and none only advances.
    new_steps: int | None = None
    recorded_states: int = 0  # states that exist throughout
    earlier_steps: int = 0  # without a loss, before all others; they only advance
    parted: bool = False  # whether no leaf may go over several blocks

    @property
    def num_steps(self) -> int:
        """Steps to differentiate."""
        return sum(self.lengths)

    @property
    def lead_steps(self) -> int:
        """Steps that only advance."""
        return self.earlier_steps + self.lead_losses

    @property
    def lead_losses(self) -> int:
        """Of these, the steps that have a loss, the last ones."""
        return max(0, (self.new_steps or 0) - self.num_steps)

    @property
    def num_losses(self) -> int:
        """Steps to differentiate that have a loss, the last ones."""
        return self.num_steps if self.new_steps is None else min(self.new_steps, self.num_steps)

    @property
    def stretches(self) -> list[Stretch]:
        """Its blocks in time order."""
        found, left = list[Stretch](), self.num_losses
        for steps in reversed(self.lengths):
            found.append(Stretch(steps, min(steps, left), is_last=not found))
            left -= found[-1].num_losses
        return found[::-1]

    def free_bytes(self, budget_bytes: int, costs: Costs) -> int:
        """What a budget leaves for the states and one leaf of a block; may be negative."""
        lead_state = costs.kept_state_bytes if self.lead_steps else 0
        return budget_bytes - self.base_bytes(costs) - lead_state

    def base_bytes(self, costs: Costs) -> int:
        """What is there whatever the schedule."""
        recorded_bytes = self.recorded_states * costs.state_bytes
        return costs.fixed.total(self.lead_steps + self.num_steps) + recorded_bytes

    def shortened(self, num_steps: int) -> Demand:
        """The same window reaching back fewer steps, without the recorded states before."""
        lengths, left = list(self.lengths), self.num_steps - num_steps
        while left >= lengths[0]:
            left -= lengths.pop(0)
        lengths[0] -= left
        dropped = len(self.lengths) - len(lengths)
        recorded = max(0, self.recorded_states - dropped)
        return replace(self, lengths=tuple(lengths), recorded_states=recorded)

    def fits(self, budget_bytes: int, costs: Costs) -> bool:
        """Whether any schedule meets the budget."""
        free = self.free_bytes(budget_bytes, costs)
        if budget_bytes - self.base_bytes(costs) < costs.update_bytes:
            return False
        if self.lead_steps and free + costs.kept_state_bytes < costs.advance_bytes(1):
            return False
        return all(
            any(way_fits(way, stretch.steps, free) for way in ways(stretch, costs))
            for stretch in set(self.stretches)
        )


def way_fits(way: Way, steps: int, free: int) -> bool:
    """Whether a stretch fits in one way; with a second state it does whatever its length."""
    costs, state = way.costs, way.costs.kept_state_bytes
    if way.last_bytes(steps) <= free:
        return True
    first_leaf = costs.leaf_bytes.longest(free)
    last_leaf = way.last_bytes.longest(free - state)
    if costs.advance_bytes(1) > free or first_leaf < 1 or last_leaf < way.least_last:
        return False
    return first_leaf + last_leaf >= steps or costs.leaf_bytes.longest(free - state) >= 1


def smallest_budget(demand: Demand, costs: Costs) -> int:
    """The least bytes that some schedule meets."""
    longest = max(demand.lengths)
    enough = demand.base_bytes(costs) + costs.update_bytes + costs.state_bytes
    enough += costs.most_bytes(longest)
    return bisect_left(range(enough), True, key=lambda budget: demand.fits(budget, costs))


def certain_budget(smallest_bytes: int, budget_bytes: int) -> int:
    """The largest budget up to the given one, from a set that does not depend on it.

    The set has the smallest budget that works, and those that are above it by a number with
    `_DIGITS` binary digits, so that neighbours are a thousandth apart.
    """
    above = budget_bytes - smallest_bytes
    return budget_bytes - above % (1 << max(0, above.bit_length() - _DIGITS))


def largest_steps(demand: Demand, budget_bytes: int, costs: Costs) -> int:
    """The most steps that a window may reach back under a budget; 0 if not even one.

    The window ends where it does; below `new_steps` its first steps only advance.
    """

    def misses(num_steps: int) -> bool:
        return not demand.shortened(num_steps).fits(budget_bytes, costs)

    # What is below `new_steps` needs one state more, so the two ranges are searched apart.
    new_steps = demand.new_steps or 0
    for least, most in ((max(1, new_steps), demand.num_steps), (1, new_steps - 1)):
        most = min(most, demand.num_steps)
        found = bisect_left(range(least, most + 1), True, key=misses)
        if found:
            return least + found - 1
    return 0
