"""`k2="auto"` as plain loops: windows of any reach from recorded states, and the rule of audits.

Nothing here comes from the package. The rule adds up whole gradients, where the package has sums of
them with signs: for modules as small as those of the tests their norms are the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import naive
import torch
from torch import Tensor


@dataclass
class Rule:
    """Sizes, what each misses on average, and the choice that follows."""

    k1: int
    max_k2: int
    tolerance: float = 0.1
    first: int = 8  # audits before anything is chosen
    most: int = 8  # windows between two audits
    window_tolerance: float | None = None
    early: int = 32  # audits, after which there may be more windows between two
    rare: int = 32  # and how many
    sizes: list[int] = field(init=False)
    audits: list[dict[int, Tensor]] = field(default_factory=list)  # what each size missed
    directions: list[dict[int, Tensor]] = field(default_factory=list)  # the same in steps, of one
    since: int = 0
    gap: int = field(init=False)

    def __post_init__(self) -> None:
        units = {round(1.25**power) for power in range(60)}
        self.sizes = sorted({n * self.k1 for n in units if n * self.k1 < self.max_k2})
        self.sizes.append(self.max_k2)
        self.k2, self.gap = self.max_k2, self.most

    def is_due(self) -> bool:
        return len(self.audits) < self.first or self.since >= self.gap

    def audited(self, gradients: dict[int, Tensor], unit: Tensor | float) -> None:
        whole = gradients[self.max_k2]
        missed = {size: whole - gradients[size] for size in self.sizes[:-1]}
        self.audits.append({**missed, self.max_k2: whole})
        length = (whole / unit).norm()
        self.directions.append({size: t / unit / length for size, t in self.audits[-1].items()})
        self.since, count = 0, len(self.audits)
        if count < self.first:
            return
        smallest = self.smallest()
        if smallest > self.k2:
            self.k2, self.gap = smallest, max(2, self.gap // 2)
        elif count == self.first:
            self.k2 = smallest
        elif smallest < self.k2:
            self.k2 = self.sizes[self.sizes.index(self.k2) - 1]
        else:
            self.gap = min(self.most if count < self.early else self.rare, self.gap + 1)

    def smallest(self) -> int:
        found = self.max_k2
        for size in reversed(self.sizes[:-1]):
            mean, noise = self.mean(size)
            if mean > 1.5 * noise and self.missing(size) > self.tolerance:
                break
            if self.window_tolerance is not None and self.share_over(size) > 0.05:
                break
            found = size
        place = self.sizes.index(found)
        return self.sizes[min(place + 1, len(self.sizes) - 1)] if place else found

    def missing(self, size: int) -> float:
        """The mean of what a size cuts off, over that of the whole gradient, without noise."""
        mean, noise = self.mean(size)
        whole, whole_noise = self.mean(self.max_k2)
        return math.sqrt(max(0.0, mean - noise) / max(whole - whole_noise, 0.1 * whole))

    def share_over(self, size: int) -> float:
        """The share of audits that missed too much of what the norm was then, newer ones more."""
        share, square = 0.0, 0.0
        for count, audit in enumerate(self.audits, 1):
            weight = max(0.02, 1 / count)
            square = (1 - weight) * square + weight * float(audit[self.max_k2].square().sum())
            is_over = float(audit[size].norm()) > self.window_tolerance * math.sqrt(square)
            share = (1 - weight) * share + weight * is_over
        return share

    def mean(self, size: int) -> tuple[float, float]:
        """Squared, the norm of the running mean, and what it would be of noise alone."""
        mean, square = torch.zeros_like(self.audits[0][size]), 0.0
        for count, audit in enumerate(self.directions, 1):
            weight = max(0.02, 1 / count)
            mean = (1 - weight) * mean + weight * audit[size]
            square = (1 - weight) * square + weight * float(audit[size].square().sum())
        return float(mean.square().sum()), square / min(len(self.audits), 99)


@dataclass(kw_only=True)
class AutoWindow(naive.NaiveWindow):
    """A window, and what was chosen for it."""

    k2: int
    is_audit: bool
    missing: float | None = None


def windows(
    problem: naive.Problem, rule: Rule, optimizer: torch.optim.Optimizer, *, stale: bool = False
) -> Iterator[AutoWindow]:
    """Every window starts from the newest state at its first step, however old that is.

    Under refresh a window leaves new states where the next one may begin.
    """
    k1, num_steps = rule.k1, len(problem.inputs)
    recorded: dict[int, Any] = {0: problem.init_state}  # the newest state at update points
    has_changed = False
    for _, new_start, stop in naive.windows(num_steps, k1, k1):
        naive.clear(problem.parameters, True)
        counted = naive.loss_steps(problem, "new", new_start, stop)
        point = -(-stop // k1) * k1  # where a window ends that is not short
        is_audit = bool(counted) and rule.is_due() and point >= rule.max_k2
        k2 = rule.max_k2 if is_audit else rule.k2
        start = begin = max(0, -(-(stop - k2) // k1) * k1)
        later = {start + k1}  # where the next window may begin
        if not counted:  # and windows behind the next may not pass these states again
            later = set(range(0, stop, k1))
        elif is_audit:
            later = {point - size + more for size in rule.sizes for more in (0, k1)}
        if not counted and (stale or not has_changed):
            start = new_start
        state, drift, terms, at = recorded[start], 0.0, [], {start: recorded[start]}
        for t in range(start, stop):
            with torch.set_grad_enabled(bool(counted)):
                is_noted = t % k1 == 0 if stale else t in later
                if start < t <= new_start and (is_noted or t == new_start):
                    drift = max(drift, naive.relative_difference(state, recorded[t]))
                if start < t <= new_start and is_noted:
                    if stale:
                        state = naive.rewired(recorded[t], state)
                    at[t] = recorded[t] = naive.mapped(Tensor.detach, state)
                y, state = problem.step(problem.inputs[t], state)
                if t in counted:
                    terms.append(naive.step_loss(problem, t, y))
        recorded[stop] = naive.mapped(Tensor.detach, state)
        audit = audited(problem, rule, at, counted, (point, stop), stale) if is_audit else None
        unit = unit_of(problem, optimizer)
        found = naive.finish(problem, terms, "mean", optimizer)
        has_changed = bool(counted)
        missing = None
        if audit is not None:
            rule.audited(audit, unit)
        elif counted:
            rule.since += 1
        if len(rule.audits) >= rule.first:
            missing = 0.0 if rule.k2 == rule.max_k2 else rule.missing(rule.k2)
        yield AutoWindow(
            start=begin,
            **{"new_start": new_start, "stop": stop, "state": recorded[stop], "drift": drift},
            **{**found, "k2": k2, "is_audit": is_audit, "missing": missing},
        )


def unit_of(problem: naive.Problem, optimizer: torch.optim.Optimizer) -> Tensor | float:
    """What Adam divides each element of the gradient by, but for a factor; 1 before its first."""
    if not optimizer.state:
        return 1.0
    (eps,) = {group["eps"] for group in optimizer.param_groups}
    squares = [optimizer.state[p]["exp_avg_sq"].reshape(-1) for p in problem.parameters]
    return torch.cat(squares).sqrt() + eps


def audited(
    problem: naive.Problem,
    rule: Rule,
    at: dict[int, Any],
    counted: set[int],
    ends: tuple[int, int],
    stale: bool,
) -> dict[int, Tensor]:
    """The whole gradient of a window that begins at each size, from the states of this one."""
    found = {}
    point, stop = ends
    for size in rule.sizes:
        state, terms = at[point - size], []
        for t in range(point - size, stop):
            if stale and t in at and t > point - size:
                state = naive.rewired(at[t], state)
            y, state = problem.step(problem.inputs[t], state)
            if t in counted:
                terms.append(naive.step_loss(problem, t, y))
        loss = sum(term for term, _ in terms) / sum(weight for _, weight in terms)
        grads = torch.autograd.grad(loss, problem.parameters, allow_unused=True)
        given = zip(grads, problem.parameters, strict=True)
        found[size] = torch.cat(
            [(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in given]
        )
    return found
