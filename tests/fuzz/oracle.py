# ruff: noqa: NPY002  (the global generator of numpy is among what is put back)
"""The definition: plain loops over torch that retain every graph. Nothing is from the package."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .case import Case, Reach


@dataclass
class Window:
    """What one window gives; None where there was nothing to differentiate."""

    loss: float | None
    grads: list[Tensor | None] | None


@dataclass
class Run:
    """What a sequence gives."""

    windows: list[Window]
    state: Any
    weights: list[Tensor]
    results: list[Any] = field(default_factory=list)  # the package's own, of each window


def mapped(change: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """The tree with its tensors changed, and copies of everything that holds them."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {key: mapped(change, item) for key, item in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(mapped(change, item) for item in tree))
    if isinstance(tree, tuple | list):
        return type(tree)(mapped(change, item) for item in tree)
    if hasattr(tree, "__dict__") and not callable(tree):
        made = copy.copy(tree)
        made.__dict__.update({k: mapped(change, v) for k, v in vars(tree).items()})
        return made
    return copy.deepcopy(tree)


def leaves(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    mapped(lambda tensor: found.append(tensor) or tensor, tree)
    return found


class _Generators:
    """All there is to draw from, put back where steps run again."""

    def __init__(self, further: list[Any]) -> None:
        self._further = further
        self.after = self._read()
        self._before: dict[int, list[Any]] = {}

    def _read(self) -> list[Any]:
        own = [
            g.get_state().clone() if isinstance(g, torch.Generator)
            else g.getstate() if isinstance(g, random.Random)
            else copy.deepcopy(g.bit_generator.state)
            for g in self._further
        ]  # fmt: skip
        return [torch.get_rng_state(), random.getstate(), np.random.get_state(), *own]

    def _write(self, states: list[Any]) -> None:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])
        for generator, state in zip(self._further, states[3:], strict=True):
            if isinstance(generator, torch.Generator):
                generator.set_state(state)
            elif isinstance(generator, random.Random):
                generator.setstate(state)
            else:
                generator.bit_generator.state = state

    def run(self, t: int, step: Callable[[], Any]) -> Any:
        """A step: with new numbers when it is new, and with the same ones ever after."""
        is_new = t not in self._before
        self._write(self._before.setdefault(t, self.after))
        result = step()
        if is_new:
            self.after = self._read()
        return result


class Loop:
    """A case as a plain loop."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(case.seed)
        random.seed(case.seed)
        np.random.seed(case.seed % 2**32)
        self.case = case
        self.module = (case.reference or case.make)()
        self.first = case.start()
        learned = [leaf for leaf in leaves(self.first) if leaf.requires_grad]
        self.parameters = [p for p in self.module.parameters() if p.requires_grad] + learned
        self.optimizer = torch.optim.SGD(self.parameters, case.lr) if case.has_optimizer else None
        self.generators = _Generators(case.generators(self.module))
        self.is_stale = case.options.get("overlap") == "stale"
        self.states: dict[int, Any] = {0: _cut(self.first)}

    def run(self, results: list[Any]) -> Run:
        """Run it; `results` are the package's, for what only a draw can say."""
        windows = list(self.case.windows())
        reaches = [Reach(first=start, start=start) for start, _, _ in windows]
        if self.case.reach is not None and results:
            reaches = [self.case.reach(*pair) for pair in zip(results, windows, strict=True)]
        with self.case.around(self.module):
            found = [
                self._window(reach, new, stop)
                for reach, (_, new, stop) in zip(reaches, windows, strict=True)
            ]
        weights = [p.detach().clone() for p in self.parameters]
        return Run(found, self.states[self.case.num_steps], weights)

    def _window(self, reach: Reach, new: int, stop: int) -> Window:
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        terms = _Terms(self.case, new, stop)
        begin, k1 = min(reach.first, new), self.case.k1
        blocks = [begin]
        if self.is_stale and begin < new:
            blocks += [p for p in range(begin - begin % k1, new, k1) if p > begin] + [new]
        state = None
        for a, b in zip(blocks, [*blocks[1:], stop], strict=True):
            state = self._block(a, b, reach, terms, state)
        loss = terms.value()
        if loss is None:
            return Window(None, None)
        if loss.requires_grad:
            loss.backward()
        if (most := self.case.options.get("clip_grad_norm")) is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, most)
        grads = [None if p.grad is None else p.grad.detach().clone() for p in self.parameters]
        if self.optimizer is not None:
            self.optimizer.step()
        return Window(float(loss.detach().real), grads)

    def _block(self, begin: int, end: int, reach: Reach, terms: _Terms, arrived: Any) -> Any:
        """Run steps from the state that is known at `begin`; gradients go on to what arrived."""
        state = self._known(begin)
        if arrived is not None:
            state = _joined(state, arrived)
        for t in range(begin, end):
            if t in reach.divisors:
                state = mapped(lambda s, by=reach.divisors[t]: _Divided.apply(s, by), state)
            if self.case.rounded is not None and t >= reach.start and t > begin:
                exact = _cut(self.states[t])
                is_last = t == terms.stop - 1
                state = _joined(exact if is_last else mapped(self._narrowed, exact), state)
            with torch.set_grad_enabled(terms.any and t >= reach.start):
                y, state = self.generators.run(t, lambda t=t, state=state: self._step(t, state))
                terms.add(t, y)
            if self.case.rounded is not None:
                with torch.no_grad():
                    self.states[t + 1] = _cut(self._step(t, _cut(self.states[t]))[1])
            elif not self.is_stale or t >= terms.new:
                self.states[t + 1] = _cut(state)
        return state

    def _known(self, step: int) -> Any:
        """The newest state there; the first one is itself, since it may learn."""
        return mapped(torch.clone, self.first) if step == 0 else _cut(self.states[step])

    def _narrowed(self, state: Tensor) -> Tensor:
        is_float = state.is_floating_point()
        return state.to(self.case.rounded).to(state.dtype) if is_float else state

    def _step(self, t: int, state: Any) -> tuple[Any, Any]:
        case = self.case
        x = case.inputs.select(case.time_dim, t).clone()
        state = self._reset(t, state)
        if not case.is_segment:
            return case.call(self.module, x, state)
        y, state = case.call(self.module, x.unsqueeze(case.time_dim), state)
        return y.select(case.time_dim, 0), state

    def _reset(self, t: int, state: Any) -> Any:
        """The state with the first one in the lanes that begin anew; lanes are rows."""
        if self.case.resets is None or not self.case.resets[t].any():
            return state
        begins, firsts = self.case.resets[t].reshape(-1, 1), iter(leaves(self.first))
        return mapped(lambda s: torch.where(begins, next(firsts), s), state)


def _cut(state: Any) -> Any:
    return mapped(lambda s: s.detach().clone(), state)


def _joined(recorded: Any, arrived: Any) -> Any:
    ends = iter(leaves(arrived))
    return mapped(lambda s: _Joint.apply(s, next(ends)), recorded)


class _Divided(torch.autograd.Function):
    """The same state, whose gradient is divided."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, by: float) -> Tensor:
        ctx.by = by
        return state.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient / ctx.by, None


class _Joint(torch.autograd.Function):
    """The recorded state, with the gradient handed to the state that arrived there."""

    @staticmethod
    def forward(ctx: Any, recorded: Tensor, arrived: Tensor) -> Tensor:
        return recorded.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


class _Terms:
    """A window's loss, added up over its steps."""

    def __init__(self, case: Case, new: int, stop: int) -> None:
        steps = [stop - 1] if case.options.get("loss") == "last" else range(new, stop)
        self.case, self.total, self.count, self.weight = case, 0.0, 0.0, 0.0
        self.new, self.stop = new, stop
        self._weights = {t: 1.0 if case.weight is None else case.weight[t] for t in steps}
        self._weights = {t: w for t, w in self._weights.items() if bool(torch.tensor(w != 0).any())}
        self.any = bool(self._weights)
        self._steps: list[tuple[Tensor, Tensor]] = []

    def add(self, t: int, y: Any) -> None:
        if t not in self._weights:
            return
        case, weight = self.case, self._weights[t]
        target = case.targets.select(case.time_dim, t)
        lanes = 1.0
        if isinstance(weight, Tensor) and weight.ndim:  # of lanes, 0 or 1
            kept = weight != 0
            y, target, lanes = y[kept], target[kept], float(weight.sum())
            weight = 1.0
        self._steps.append((y, target))
        self.total = self.total + weight * case.loss.total(y, target)
        self.count = self.count + weight * case.loss.count(y, target)
        self.weight = self.weight + weight * lanes

    def value(self) -> Tensor | None:
        """What the table of docs/semantics.md says that the window's loss is."""
        loss, case = self.case.loss, self.case
        if not self.any or float(self.count) == 0:
            return None
        is_sum = case.options.get("reduction") == "sum"
        if loss.form == "pair":
            return self.total if is_sum else self.total / self.count
        mean = self.total / self.count
        if loss.window is not None:
            mean = loss.window(*(torch.stack(each) for each in zip(*self._steps, strict=True)))
        if loss.form == "sum":
            mean = self.total if case.is_segment else self.total / self.weight
        return mean * self.weight if is_sum else mean
