"""Truncated BPTT as plain loops: the definition that the package is held against.

Nothing here comes from the package, and nothing is clever: every step runs one at a time,
the graph of a whole window stays alive, and one `backward` differentiates it.

Update points are t_n = min(n * k1, T). Window n has the new steps [t_{n-1}, t_n) and
reaches back to max(0, t_n - k2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from devices import generator_states, set_generator_states
from torch import Tensor, nn

State = Any


@dataclass(kw_only=True)
class Problem:
    """A recurrent step, its data, and the tensors whose gradients are wanted."""

    step: Callable[[Any, State], tuple[Any, State]]
    loss_fn: Callable[[Any, Any], Any]  # a scalar, or (loss_sum, weight)
    inputs: Sequence[Any]  # one entry per step
    targets: Sequence[Any]  # one entry per step; None is an absent target
    init_state: State
    parameters: Sequence[Tensor]
    weights: Sequence[float] | None = None  # factor of each step's loss; 0 is an absent target
    module: nn.Module | None = None  # the owner of buffers, where there are any

    def weight(self, t: int) -> float:
        if self.targets[t] is None:
            return 0.0
        return 1.0 if self.weights is None else float(self.weights[t])


@dataclass(kw_only=True)
class NaiveWindow:
    """What one window gives."""

    start: int
    new_start: int
    stop: int
    loss: Tensor | None
    loss_sum: float
    loss_weight: float
    grads: list[Tensor | None]
    state: State
    drift: float


def windows(num_steps: int, k1: int, k2: int | None) -> list[tuple[int, int, int]]:
    """Every window as (start, new_start, stop)."""
    found, new_start = [], 0
    while new_start < num_steps:
        stop = min(new_start + k1, num_steps)
        start = 0 if k2 is None else max(0, stop - k2)
        found.append((start, new_start, stop))
        new_start = stop
    return found


def windows_of_a_stream(num_steps: int, k1: int, k2: int | None) -> list[tuple[int, int, int]]:
    """Stale windows where the length shows only k1 steps ahead.

    A short last window wants a start off the regular grid. Its state is recorded if the step
    was new in the window before, where the end is in sight; otherwise the window starts at
    the first state that was recorded: an update point, or a full window's start.
    """
    *before, (wanted, new_start, stop) = windows(num_steps, k1, k2)
    if stop % k1 == 0 or not before or wanted >= before[-1][1]:
        return [*before, (wanted, new_start, stop)]
    regular = windows((len(before) + 1) * k1, k1, k2)
    recorded = {start for start, _, _ in regular} | {end for _, _, end in before}
    return [*before, (min(p for p in recorded if p >= wanted), new_start, stop)]


def refresh(
    problem: Problem,
    k1: int,
    k2: int | None,
    *,
    loss: str = "new",
    reduction: str = "mean",
    optimizer: torch.optim.Optimizer | None = None,
    zero_grad: bool = True,
) -> Iterator[NaiveWindow]:
    """Each window runs from the state the window before left at its start, with today's weights."""
    cuts = windows(len(problem.inputs), k1, k2)
    runs = FirstRuns(problem, {stop for _, _, stop in cuts})
    latest: dict[int, State] = {0: problem.init_state}  # newest state at each position
    for start, new_start, stop in cuts:
        clear(problem.parameters, zero_grad)
        counted = loss_steps(problem, loss, new_start, stop)
        first = min(start, new_start)
        runs.begin_window(first, new_start)
        state, drift, terms = latest[first], 0.0, []
        for t in range(first, stop):
            with torch.set_grad_enabled(bool(counted) and t >= start):
                y, state = runs.step(t, state)
                if t in counted:
                    terms.append(step_loss(problem, t, y))
            if t + 1 == new_start:
                drift = relative_difference(state, latest[t + 1])
            latest[t + 1] = mapped(Tensor.detach, state)
        update = finish(problem, terms, reduction, optimizer)
        yield NaiveWindow(
            start=start, new_start=new_start, stop=stop, state=latest[stop], drift=drift, **update
        )


def stale(
    problem: Problem,
    k1: int,
    k2: int | None,
    *,
    loss: str = "new",
    reduction: str = "mean",
    optimizer: torch.optim.Optimizer | None = None,
    zero_grad: bool = True,
    stream: bool = False,
) -> Iterator[NaiveWindow]:
    """Blocks between update points restart from the states recorded when their steps were new."""
    cuts = (windows_of_a_stream if stream else windows)(len(problem.inputs), k1, k2)
    update_points = {stop for _, _, stop in cuts}
    runs = FirstRuns(problem, update_points)
    recorded: dict[int, State] = {0: problem.init_state}  # the state at each position when new
    for start, new_start, stop in cuts:
        clear(problem.parameters, zero_grad)
        counted = loss_steps(problem, loss, new_start, stop)
        first = min(start, new_start) if counted else new_start
        runs.begin_window(first, new_start)
        state, drift, terms = recorded[first], 0.0, []
        for t in range(first, stop):
            with torch.set_grad_enabled(bool(counted) and t >= start):
                if t > first and t in update_points:
                    drift = max(drift, relative_difference(state, recorded[t]))
                    state = rewired(recorded[t], state)
                y, state = runs.step(t, state)
                if t in counted:
                    terms.append(step_loss(problem, t, y))
            if t >= new_start:
                recorded[t + 1] = mapped(Tensor.detach, state)
        update = finish(problem, terms, reduction, optimizer)
        yield NaiveWindow(
            start=start, new_start=new_start, stop=stop, state=recorded[stop], drift=drift, **update
        )


OVERLAPS = {"refresh": refresh, "stale": stale}


class FirstRuns:
    """Runs steps, and lets a step that runs again see what it saw when it was new.

    A step draws the random numbers of its first run. Buffers are changed by first runs
    only: a re-run begins, at the window's first step and again at every update point, with
    the buffers that the step there saw when it was new, and what it leaves is thrown away.
    """

    def __init__(self, problem: Problem, update_points: set[int]) -> None:
        self.problem, self.update_points = problem, update_points
        self.generators: dict[int, list[Tensor]] = {}
        self.buffers: dict[int, dict[str, Tensor]] = {}

    def begin_window(self, first: int, new_start: int) -> None:
        self.first, self.new_start = first, new_start
        self.left = copied_buffers(self.problem.module)

    def step(self, t: int, state: State) -> tuple[Any, State]:
        if t < self.new_start:
            return self._again(t, state)
        if t == self.new_start:
            set_buffers(self.problem.module, self.left)
        self.generators[t] = generator_states()
        self.buffers[t] = copied_buffers(self.problem.module)
        return self.problem.step(self.problem.inputs[t], state)

    def _again(self, t: int, state: State) -> tuple[Any, State]:
        if t == self.first or t in self.update_points:
            set_buffers(self.problem.module, self.buffers[t])
        after = generator_states()
        set_generator_states(self.generators[t])
        try:
            return self.problem.step(self.problem.inputs[t], state)
        finally:
            set_generator_states(after)


def loss_steps(problem: Problem, loss: str, new_start: int, stop: int) -> set[int]:
    """Steps of a window whose losses count."""
    candidates = range(new_start, stop) if loss == "new" else [stop - 1]
    return {t for t in candidates if problem.weight(t) != 0}


def step_loss(problem: Problem, t: int, y: Any) -> tuple[Tensor, float]:
    """Summed loss and weight of one step."""
    value = problem.loss_fn(y, problem.targets[t])
    loss_sum, weight = value if isinstance(value, tuple) else (value, 1.0)
    return problem.weight(t) * loss_sum, problem.weight(t) * float(weight)


def finish(
    problem: Problem,
    terms: list[tuple[Tensor, float]],
    reduction: str,
    optimizer: torch.optim.Optimizer | None,
) -> dict[str, Any]:
    """Differentiate the window's loss and update; without any weight there is no loss."""
    weight = sum(w for _, w in terms)
    loss = None
    if weight != 0:
        loss_sum = torch.stack([loss_sum for loss_sum, _ in terms]).sum()
        loss = loss_sum / weight if reduction == "mean" else loss_sum
        if loss.requires_grad:
            loss.backward()
    grads = [None if p.grad is None else p.grad.clone() for p in problem.parameters]
    if optimizer is not None and loss is not None:
        optimizer.step()
    return {
        "loss": None if loss is None else loss.detach(),
        "loss_sum": sum(float(loss_sum.detach()) for loss_sum, _ in terms),
        "loss_weight": weight,
        "grads": grads,
    }


class Rewire(torch.autograd.Function):
    """The value of one tensor with the gradient of another."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradient_goes_to: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def rewired(recorded: State, recomputed: State) -> State:
    """The recorded state; the gradient that arrives at it goes to the recomputed one."""
    values = iter(
        [
            Rewire.apply(a, b) if a.is_floating_point() else a
            for a, b in zip(tensors(recorded), tensors(recomputed), strict=True)
        ]
    )
    return mapped(lambda _: next(values), recorded)


def clear(parameters: Sequence[Tensor], really: bool) -> None:
    for p in parameters if really else ():
        p.grad = None


def tensors(state: State) -> list[Tensor]:
    """The tensors of a nested state, in order."""
    found: list[Tensor] = []
    mapped(lambda leaf: found.append(leaf) or leaf, state)
    return found


def mapped(fn: Callable[[Tensor], Tensor], state: State) -> State:
    """The same nesting with `fn` applied to its tensors."""
    if isinstance(state, Tensor):
        return fn(state)
    if isinstance(state, dict):
        return {key: mapped(fn, value) for key, value in state.items()}
    if isinstance(state, tuple | list):
        return type(state)(mapped(fn, value) for value in state)
    return state


def relative_difference(recomputed: State, recorded: State) -> float:
    """2-norm of the difference of all floating tensors together, over that of `recorded`."""
    pairs = [
        (a.detach(), b.detach())
        for a, b in zip(tensors(recomputed), tensors(recorded), strict=True)
        if b.is_floating_point()
    ]
    difference = math.sqrt(sum(float((a - b).square().sum()) for a, b in pairs))
    size = math.sqrt(sum(float(b.square().sum()) for _, b in pairs))
    if size == 0.0:
        return 0.0 if difference == 0.0 else math.inf
    return difference / size


def copied_buffers(module: nn.Module | None) -> dict[str, Tensor]:
    if module is None:
        return {}
    return {name: value.detach().clone() for name, value in module.named_buffers()}


def set_buffers(module: nn.Module | None, values: dict[str, Tensor]) -> None:
    """Replace buffers, rather than write into them: graphs alive may have saved the old ones."""
    if module is None:
        return
    for name, value in values.items():
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, value.clone())
