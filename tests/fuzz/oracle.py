# ruff: noqa: NPY002  (the global generator of numpy is among what is put back)
"""The definition: plain loops over torch that retain every graph. Nothing is from the package."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .case import Case


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
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(self.parameters, case.lr) if case.has_optimizer else None
        self.generators = _Generators(case.generators(self.module))
        self.states: dict[int, Any] = {0: case.start()}

    def run(self) -> Run:
        stale = self.case.options.get("overlap") == "stale"
        with self.case.around(self.module):
            found = [self._window(*w, stale=stale) for w in self.case.windows()]
        weights = [p.detach().clone() for p in self.parameters]
        return Run(found, self.states[self.case.num_steps], weights)

    def _window(self, start: int, new: int, stop: int, *, stale: bool) -> Window:
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        terms = _Terms(self.case, new, stop)
        points = [p for p in range(start - start % self.case.k1, new, self.case.k1) if p > start]
        blocks = [min(start, new), *points, new] if stale and start < new else [min(start, new)]
        state = None
        for begin, end in zip(blocks, [*blocks[1:], stop], strict=True):
            state = self._block(begin, end, (start, new), terms, state)
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

    def _block(
        self, begin: int, end: int, reach: tuple[int, int], terms: _Terms, arrived: Any
    ) -> Any:
        """Run steps from the state that is known at `begin`; gradients go on to what arrived."""
        start, new = reach
        state = mapped(lambda s: s.detach().clone(), self.states[begin])
        if arrived is not None:
            ends = iter(leaves(arrived))
            state = mapped(lambda s: _Joint.apply(s, next(ends)), state)
        is_refresh = self.case.options.get("overlap") != "stale"
        for t in range(begin, end):
            with torch.set_grad_enabled(terms.any and t >= start):
                y, state = self.generators.run(t, lambda t=t, state=state: self._step(t, state))
                terms.add(t, y)
            if is_refresh or t >= new:
                self.states[t + 1] = mapped(lambda s: s.detach().clone(), state)
        return state

    def _step(self, t: int, state: Any) -> tuple[Any, Any]:
        case = self.case
        x = case.inputs.select(case.time_dim, t).clone()
        if not case.is_segment:
            return case.call(self.module, x, state)
        y, state = case.call(self.module, x.unsqueeze(case.time_dim), state)
        return y.select(case.time_dim, 0), state


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
