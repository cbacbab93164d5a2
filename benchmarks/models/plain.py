"""Truncated BPTT as a plain loop that retains each window; nothing here comes from the package."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models.model import Model

Gradients = list[Tensor | None]


def plain_gradients(model: Model, module: Any, step_size: float) -> list[Gradients]:
    """The gradients of every window, each followed by a step of plain SGD."""
    x, y = model.data()
    where, length = model.time_dim or 0, x.shape[model.time_dim or 0]
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    run = _Runs(module, _call(module), one_step=_one_step(model, module))
    stops = [min(stop, length) for stop in range(model.k1, length + model.k1, model.k1)]
    starts = [max(0, stop - model.k2) for stop in stops]
    states, found = {0: model.state()}, list[Gradients]()
    for start, new_start, stop in zip(starts, [0, *stops], stops, strict=False):
        module.zero_grad(set_to_none=True)
        state, loss = detached(states[start]), torch.zeros((), dtype=model.dtype)
        places = range(stop + 1) if run.one_step else [new_start, *starts]
        cuts = sorted({p for p in places if start < p < stop} | {start, stop})
        run.begin(start, new_start, stops)
        for a, b in itertools.pairwise(cuts):
            piece = (
                t.select(where, a) if run.one_step else t.narrow(where, a, b - a) for t in (x, y)
            )
            x_piece, y_piece = piece
            output, state = run(a, x_piece, state)
            states[b] = detached(state)
            if a >= new_start:
                loss = loss + model.loss_fn(output, y_piece) * (b - a)
        (loss / (stop - new_start)).backward()
        found.append([None if w.grad is None else w.grad.clone() for w in weights])
        with torch.no_grad():
            for weight in weights:
                if weight.grad is not None:
                    weight.add_(weight.grad, alpha=-step_size)
    return found


class _Runs:
    """Steps that run again draw what they drew when they were new, and find the buffers of then."""

    def __init__(self, module: Any, call: Callable[..., Any], *, one_step: bool) -> None:
        self.module, self.call, self.one_step = module, call, one_step
        self.generators, self.buffers = dict[int, Tensor](), dict[int, Any]()

    def begin(self, start: int, new_start: int, update_points: list[int]) -> None:
        self.new_start, self.puts_back = new_start, {start, *update_points}
        self.left = _buffers(self.module)

    def __call__(self, step: int, x: Tensor, state: Any) -> Any:
        if step >= self.new_start:
            if step == self.new_start:
                _set_buffers(self.module, self.left)
            self.generators[step] = torch.get_rng_state()
            self.buffers[step] = _buffers(self.module)
            return self.call(x, state)
        if step in self.puts_back:
            _set_buffers(self.module, self.buffers[step])
        after = torch.get_rng_state()
        torch.set_rng_state(self.generators[step])
        result = self.call(x, state)
        torch.set_rng_state(after)
        return result


def detached(state: Any) -> Any:
    """A state in new containers, of tensors without a graph."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {key: detached(value) for key, value in state.items()}
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        return type(state)(*map(detached, state))
    if isinstance(state, tuple | list):
        return type(state)(map(detached, state))
    return state


def _call(module: Any) -> Callable[..., Any]:
    """torch's cells return their state alone."""
    if not isinstance(module, nn.RNNCellBase):
        return module

    def call(x: Tensor, state: Any) -> Any:
        state = module(x, state)
        return (state[0] if isinstance(state, tuple) else state), state

    return call


def _one_step(model: Model, module: Any) -> bool:
    return not isinstance(module, nn.RNNBase) if model.per_step is None else model.per_step


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_buffers()}


def _set_buffers(module: nn.Module, values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        owner, _, leaf = name.rpartition(".")
        module.get_submodule(owner)._buffers[leaf] = value.clone()
