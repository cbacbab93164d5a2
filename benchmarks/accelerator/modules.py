"""Recurrences of every kind, and plain BPTT of them, by torch alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

mse = nn.functional.mse_loss


class Stack(nn.Module):
    """One step of two cells of the user's own, with dropout between."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.second = nn.LSTMCell(width, width), nn.GRUCell(width, width)
        self.drop, self.readout = nn.Dropout(dropout), nn.Linear(width, width)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        state, g = (None, None) if state is None else state
        h, c = self.first(x, state)
        g = self.second(self.drop(h), g)
        return self.readout(g), ((h, c), g)


class LinearCell(nn.Module):
    """One step of two linear maps, as users write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.read, self.carry = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        h = torch.zeros_like(x) if h is None else h
        h = torch.tanh(self.read(x) + self.carry(h))
        return h, h


@dataclass(frozen=True)
class Case:
    """A module and whether it runs a step or a segment."""

    name: str
    module: nn.Module
    is_per_step: bool


def cases(width: int, dropout: float = 0.0) -> Iterator[Case]:
    """One of each kind, with the same weights in every run."""
    torch.manual_seed(0)
    yield Case("LSTMCell", nn.LSTMCell(width, width), True)
    yield Case("GRUCell", nn.GRUCell(width, width), True)
    yield Case("stack of cells", Stack(width, dropout), True)
    yield Case("own linear cell", LinearCell(width), True)
    yield Case("nn.LSTM", nn.LSTM(width, width), False)
    yield Case("nn.LSTM, 2 layers", nn.LSTM(width, width, 2), False)
    yield Case("nn.GRU", nn.GRU(width, width), False)


def chosen(width: int, *names: str) -> list[Case]:
    """Those of these names."""
    return [case for case in cases(width) if case.name in names]


def plain_gradient(case: Case, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Everything is kept, and one backward."""
    case.module.zero_grad(set_to_none=True)
    outputs = _by_steps(case.module, inputs) if case.is_per_step else case.module(inputs)[0]
    mse(outputs, targets).backward()
    return gradient_of(case.module)


def _by_steps(module: nn.Module, inputs: Tensor) -> Tensor:
    state, outputs = None, []
    for x in inputs:
        result = module(x, state)
        if isinstance(module, nn.RNNCellBase):
            state, output = result, result[0] if isinstance(result, tuple) else result
        else:
            output, state = result
        outputs.append(output)
    return torch.stack(outputs)


def gradient_of(module: nn.Module) -> dict[str, Tensor]:
    """By name, on the CPU in float64."""
    return {
        name: p.grad.detach().to("cpu", torch.float64)
        for name, p in module.named_parameters()
        if p.grad is not None
    }


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest relative difference over the weights; infinite where one has no gradient."""
    if found.keys() != expected.keys():
        return float("inf")
    return max(
        float((found[name] - grad).norm() / grad.norm().clamp_min(1e-300))
        for name, grad in expected.items()
    )
