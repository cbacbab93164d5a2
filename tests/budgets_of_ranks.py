"""Budgets of two ranks that hold their weights together, each within bytes of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import gradients, mean_loss, relative_error
from joined_ranks import local, sharded
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, InfeasibleBudgetError, TensorSequence

STEPS, K1, K2, WIDTH = 24, 4, 16, 96


class Wide(nn.Module):
    """Weights, states and leaves that a budget has to count; a readout that shards unevenly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.readout = nn.LSTMCell(16, WIDTH), nn.Linear(WIDTH, 7)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        h, c = self.cell(x, state)
        return self.readout(h), (h, c)


def sharded_inside(module: Wide) -> nn.Module:
    sharded(module.cell)
    return sharded(module)


BY_DEFAULT: list[Any] = [(sharded, torch.optim.Adam, {})]
BUDGETS: list[Any] = [
    (wrap, kind, {"accumulate": windows})
    for wrap in (sharded, sharded_inside)
    for kind in (torch.optim.Adam, torch.optim.SGD)
    for windows in (1, 2)
]


def run(rank: int, wrap: Any, kind: Any, **how: Any) -> tuple[int, list[Tensor]]:
    """The highest peak of all windows, and the gradients of the last update."""
    module = wrap(Wide().double())
    weights, lanes = list(module.parameters()), 4 + 4 * rank
    torch.manual_seed(1 + rank)
    data = [torch.randn(STEPS, lanes, size, dtype=torch.float64) for size in (16, 7)]
    optimizer = kind(weights, lr=0.01)
    given = {"ranks": "all", "measure_memory": True, **how}
    result = TBPTT(module, mean_loss, K1, K2, optimizer, **given).train(TensorSequence(*data))
    return result.peak_bytes, [each.clone() for each in local(gradients(weights))]


def check_budgets(rank: int, count: int, cases: list[Any] = BY_DEFAULT) -> None:
    for wrap, kind, how in cases:
        most, expected = run(rank, wrap, kind, strategy="retain", **how)
        with pytest.raises(InfeasibleBudgetError) as caught:
            run(rank, wrap, kind, memory_budget=most // 4, **how)
        smallest = caught.value.smallest_budget_bytes
        assert smallest is not None
        assert smallest < most, (rank, how)  # another one on each rank, as are their lanes
        peak, found = run(rank, wrap, kind, memory_budget=smallest, **how)
        assert 0.8 * smallest < peak <= smallest, (rank, how)
        assert relative_error(found, expected) <= 1e-12, (rank, how)
