"""Budgets of two ranks with other lanes, each within bytes of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import gradients, mean_loss, relative_error
from joined_ranks import local, sharded
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, InfeasibleBudgetError, TensorSequence, measure_costs

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


BY_DEFAULT: list[Any] = [(wrap, torch.optim.Adam, {}) for wrap in (sharded, nn.Identity())]
BUDGETS: list[Any] = [
    (wrap, kind, {"accumulate": windows})
    for wrap in (nn.Identity(), sharded, sharded_inside)
    for kind in (torch.optim.Adam, torch.optim.SGD)
    for windows in (1, 2)
]


def steps_of(rank: int) -> list[Tensor]:
    """Inputs and targets of its lanes, which each rank has others of."""
    torch.manual_seed(1 + rank)
    sizes = (STEPS, 4 + 4 * rank)
    return [torch.randn(*sizes, width, dtype=torch.float64) for width in (16, 7)]


def run(rank: int, wrap: Any, kind: Any, **how: Any) -> tuple[int, list[Tensor]]:
    """The highest peak of all windows, and the gradients of the last update."""
    module = wrap(Wide().double())
    weights = list(module.parameters())
    optimizer = kind(weights, lr=0.01)
    given = {"ranks": "all", "measure_memory": True, **how}
    result = TBPTT(module, mean_loss, K1, K2, optimizer, **given).train(
        TensorSequence(*steps_of(rank))
    )
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


def check_costs_of_the_slowest(rank: int, count: int) -> None:
    """Costs that were measured on one rank hold the budgets of all."""
    slowest, sent = count - 1, [None]
    if rank == slowest:
        sent = [measure_costs(Wide().double(), mean_loss, *steps_of(rank))]
    dist.broadcast_object_list(sent, src=slowest)
    check_budgets(rank, count, [(nn.Identity(), torch.optim.Adam, {"costs": sent[0]})])
