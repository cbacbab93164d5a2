"""A measured window against its prediction: what its costs should have been."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, islice

from tbptt_ckpt.budget.curves import ROUNDING_BYTES, TOLERANCE, raised, scaled
from tbptt_ckpt.errors import InfeasibleBudgetError
from tbptt_ckpt.memory.meter import Lap
from tbptt_ckpt.schedule.actions import Action, Advance, Differentiate, Drop, Keep, Schedule, moved
from tbptt_ckpt.schedule.costs import Costs, Curve
from tbptt_ckpt.schedule.plan import Plan
from tbptt_ckpt.schedule.stretch import Block

_LEAST_RATIO = 0.1

Replan = Callable[[int, int, int, Costs], Plan]
Refuse = Callable[[InfeasibleBudgetError], InfeasibleBudgetError]


@dataclass(slots=True)
class Ratios:
    """Measured over predicted bytes, at their largest; None before the first."""

    largest: float | None = None

    def add(self, measured: float, curve: Curve, steps: int) -> None:
        """One more measurement; what allocators round is no deviation."""
        predicted = max(curve(steps), 1.0)
        ratio = max(measured / predicted, _LEAST_RATIO)
        if abs(measured - predicted) <= ROUNDING_BYTES:
            ratio = 1.0
        self.largest = ratio if self.largest is None else max(self.largest, ratio)

    @property
    def factor(self) -> float:
        """What the curve is to be multiplied by, from one length on to all of them."""
        return max(1.0, self.largest or 1.0)

    @property
    def factor_either_way(self) -> float:
        """The same where lengths of all sizes were measured, so that it may be smaller too."""
        if self.largest is None or 1 - TOLERANCE <= self.largest <= 1:
            return 1.0
        return self.largest


@dataclass(slots=True)
class Corrections:
    """Compares the actions of one window with its costs, and replans the rest if it must.

    Attributes:
        plan: The window's plan.
        costs: What it was made from, with the window's fixed part.
        stop: End of the window.
        given: Steps whose states need not be kept.
        budget_bytes: Never to be exceeded.
        missing_bytes: Of the fixed part, what does not exist before the update.
        gradient_bytes: What the first leaf's backward leaves behind.
        first_state_bytes: A first state that the module makes for itself.
        replan: Plans steps `[start, stop)` beside so many bytes.
        refuse: Explains that the rest of the window does not fit.
        rest: The actions that replaced those of the plan, where it was left.
        peak_bytes: The highest so far.
    """

    plan: Plan
    costs: Costs
    stop: int
    given: frozenset[int]
    budget_bytes: int
    missing_bytes: int
    gradient_bytes: int
    first_state_bytes: int
    replan: Replan
    refuse: Refuse = field(default=lambda error: error)
    rest: list[Action] = field(default_factory=list)
    leaf: Ratios = field(default_factory=Ratios)
    last_leaf: Ratios = field(default_factory=Ratios)
    advances: dict[int, int] = field(default_factory=dict)
    excess_bytes: int = 0
    peak_bytes: int = 0
    _kept: list[int] = field(default_factory=list)
    _num_done: int = 0
    _bound_calls: Callable[[int], None] | None = None

    def attach(self, bound_calls: Callable[[int], None]) -> None:
        """The window begins; `bound_calls` sets the most steps of one call in an advance."""
        self._bound_calls = bound_calls

    def after(
        self, action: Action, begun: Lap, ended: Lap, pending: Iterator[Action]
    ) -> Iterator[Action]:
        """Take in what an action took; a rest that would exceed the budget is planned anew.

        Raises:
            InfeasibleBudgetError: The rest does not fit however it is planned.
        """
        self.peak_bytes = max(self.peak_bytes, ended.peak_bytes)
        self._num_done += not self.rest
        match action:
            case Keep(step):
                self._kept.append(step)
            case Drop(step):
                self._kept.remove(step)
            case Advance(start, stop):
                steps = min(stop - start, self.plan.advance_steps)
                taken = ended.peak_bytes - begun.now_bytes - self._made_at(start)
                if taken > self.costs.advance_bytes(steps) + ROUNDING_BYTES:
                    self.advances[steps] = max(taken, self.advances.get(steps, 0))
            case Differentiate(start, stop):
                self._compare_leaf(start, stop, begun, ended)
                if start > self._begin and self._must_replan(start):
                    return self._replanned(start)
        return pending

    def corrected(self, costs: Costs) -> Costs:
        """Costs that would have predicted this window, or slightly more."""
        last = costs.last_leaf_bytes
        return replace(
            costs,
            leaf_bytes=scaled(costs.leaf_bytes, self.leaf.factor_either_way),
            last_leaf_bytes=last and scaled(last, self._last_leaf_factor),
            advance_bytes=raised(costs.advance_bytes, self.advances),
            fixed=replace(costs.fixed, other=costs.fixed.other + self.excess_bytes),
        )

    @property
    def _last_leaf_factor(self) -> float:
        """Measured at one length only: smaller than one only as far as other leaves agree."""
        return max(self.last_leaf.factor_either_way, min(1.0, self.leaf.factor_either_way))

    def _compare_leaf(self, start: int, stop: int, begun: Lap, ended: Lap) -> None:
        taken, steps = ended.peak_bytes - begun.now_bytes, stop - start
        taken -= self._made_at(start)
        if stop == self.stop and self.costs.last_leaf_bytes is not None:
            self.last_leaf.add(taken - self.gradient_bytes, self.costs.last_leaf_bytes, steps)
            return
        self.leaf.add(taken, self.costs.leaf_bytes, steps)
        kept = len(self._kept) + (start not in self.given and start not in self._kept)
        expected = self._fixed_bytes + kept * self.costs.state_bytes
        if begun.now_bytes > expected + ROUNDING_BYTES:
            self.excess_bytes = max(self.excess_bytes, begun.now_bytes - expected)

    def _made_at(self, start: int) -> int:
        """Bytes of the state that a run from `start` makes for itself."""
        return self.first_state_bytes if start == self.plan.first else 0

    def _must_replan(self, stop: int) -> bool:
        """Whether the leaves to come would take more than there is."""
        predicted = self.plan.predicted_peak_bytes
        assert predicted is not None, "it was made from costs"
        longest = min(self.plan.longest_leaf, stop - self._begin)
        more = (self.leaf.factor - 1) * self.costs.leaf_bytes(longest) + self.excess_bytes
        return not self.rest and more > ROUNDING_BYTES and predicted + more > self.budget_bytes

    def _replanned(self, stop: int) -> Iterator[Action]:
        """The steps before `stop`, block by block between the states that are kept."""
        costs = self.corrected(replace(self.costs, last_leaf_bytes=None))
        for step in [step for step in self._kept if step >= stop]:
            yield self._noted(Drop(step))
        while stop > self._begin:
            start = max(s for s in {self._begin, *self.given, *self._kept} if s < stop)
            kept = sum(step <= start for step in self._kept)
            beside = self._fixed_bytes + self.excess_bytes + kept * costs.state_bytes
            drops = [Drop(start)] if start in self._kept else []
            try:
                part = self.replan(start, stop, beside, costs)
            except InfeasibleBudgetError as error:
                if not drops or start in self.given:
                    raise self.refuse(error) from None
                yield self._noted(drops[0])  # the steps from an earlier state need one less
                continue
            if self._bound_calls is not None:
                self._bound_calls(part.advance_steps)
            for action in chain(part.schedule, drops):
                yield self._noted(action)
            stop = start

    def _noted(self, action: Action) -> Action:
        self.rest.append(action)
        return action

    def executed_plan(self, plan: Plan) -> Plan:
        """The plan as it was followed."""
        if not self.rest:
            return plan
        actions = [*islice(plan.schedule, self._num_done), *self.rest]
        if self.plan.lead_steps:  # the plan itself adds what comes before and after
            actions = actions[2:-1]
        relative = [moved(action, -self._begin) for action in actions]
        block = Block(self.plan.num_steps, Schedule(lambda: iter(relative), len(relative)))
        return replace(self.plan, blocks=(block,))

    @property
    def _begin(self) -> int:
        """First step that is differentiated."""
        return self.plan.first + self.plan.lead_steps

    @property
    def _fixed_bytes(self) -> int:
        """What exists in any case while leaves run."""
        fixed = self.costs.fixed.total(self.plan.lead_steps + self.plan.num_steps)
        return fixed - self.missing_bytes
