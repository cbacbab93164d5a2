"""Sequences of different lengths, trained one by one: what lanes are held against.

Nothing here comes from the package. Lanes decide only when a sequence runs: its steps have the
numbers that they have in its lane, windows are cut by those numbers, and a window's loss is
that of all steps that it holds, whatever sequence they belong to. Every sequence runs alone,
as a batch of one, from its lane's row of the initial state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from naive import State, clear, mapped, rewired, windows
from torch import Tensor


@dataclass
class Run:
    """One sequence in its place: it occupies the steps `[start, stop)` of a lane."""

    lane: int
    start: int
    stop: int
    inputs: Tensor
    targets: Tensor
    states: dict[int, State] = field(default_factory=dict)  # newest, or recorded, by step


@dataclass(kw_only=True)
class LaneProblem:
    """A step for a batch of one, sequences, and the state that lane `b` begins from."""

    step: Callable[[Tensor, State], tuple[Tensor, State]]
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    sequences: Sequence[tuple[Tensor, Tensor]]
    initial: Callable[[int], State]
    parameters: Sequence[Tensor]
    burn_in: int = 0
    label_at_the_end: bool = False  # the only step of a sequence with a target


@dataclass(kw_only=True)
class LaneWindow:
    """What one window gives; `states` has those of the lanes that ran its last step."""

    start: int
    stop: int
    loss: Tensor | None
    grads: list[Tensor | None]
    states: dict[int, State]


def place(sequences: Sequence[tuple[Tensor, Tensor]], lanes: int) -> list[Run]:
    """Each sequence goes to the lane that ends first, the lowest of those."""
    ends, runs = [0] * lanes, []
    for inputs, targets in sequences:
        lane = ends.index(min(ends))
        runs.append(Run(lane, ends[lane], ends[lane] + len(inputs), inputs, targets))
        ends[lane] += len(inputs)
    return runs


def train(
    problem: LaneProblem,
    lanes: int,
    k1: int,
    k2: int | None,
    *,
    overlap: str = "refresh",
    loss: str = "new",
    reduction: str = "mean",
    optimizer: torch.optim.Optimizer | None = None,
) -> Iterator[LaneWindow]:
    """Every window of every sequence, one sequence after another."""
    runs = place(problem.sequences, lanes)
    cuts = windows(max(run.stop for run in runs), k1, k2)
    for start, new_start, stop in cuts:
        clear(problem.parameters, optimizer is not None)
        first_loss = new_start if loss == "new" else stop - 1
        first = min(start, new_start)
        terms: list[Tensor] = []
        for run in runs:
            terms += run_window(
                problem, run, first, start, new_start, stop, first_loss, overlap, k1
            )
        value = None
        if terms:
            value = torch.stack(terms).sum() / (len(terms) if reduction == "mean" else 1)
            if value.requires_grad:
                value.backward()
        grads = [None if p.grad is None else p.grad.clone() for p in problem.parameters]
        if optimizer is not None and value is not None:
            optimizer.step()
        yield LaneWindow(
            start=start,
            stop=stop,
            loss=None if value is None else value.detach(),
            grads=grads,
            states={r.lane: r.states[stop] for r in runs if r.start < stop <= r.stop},
        )


def run_window(
    problem: LaneProblem,
    run: Run,
    first: int,
    start: int,
    new_start: int,
    stop: int,
    first_loss: int,
    overlap: str,
    k1: int,
) -> list[Tensor]:
    """The losses of one sequence in one window; the newest states stay in `run.states`."""
    begin, terms = max(first, run.start), []
    state: Any = problem.initial(run.lane) if begin == run.start else run.states.get(begin)
    for t in range(begin, min(stop, run.stop)):
        local = t - run.start
        with torch.set_grad_enabled(t >= start):
            if overlap == "stale" and begin < t <= new_start and t % k1 == 0:
                state = rewired(run.states[t], state)
            y, state = problem.step(run.inputs[local : local + 1], state)
            has_target = t + 1 == run.stop or not problem.label_at_the_end
            if t >= first_loss and local >= problem.burn_in and has_target:
                terms.append(problem.loss_fn(y, run.targets[local : local + 1]))
        if overlap == "refresh" or t >= new_start:
            run.states[t + 1] = mapped(Tensor.detach, state)
    return terms
