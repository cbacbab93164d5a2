"""Budgets of two ranks with other lanes, each within bytes of its own."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import gradients, mean_loss, relative_error
from joined_ranks import local, sharded
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, InfeasibleBudgetError, TensorSequence, Trainer, measure_costs
from tbptt_ckpt.budget import window_costs
from tbptt_ckpt.budget.window_costs import WindowCosts
from tbptt_ckpt.engine.shared_costs import SharedCosts

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


def measured_by(
    rank: int, steps: list[Tensor], weight: Tensor | None = None, *, fails: bool = False, **how: Any
) -> tuple[list[int], bool]:
    """How often each rank has measured costs, and whether all windows had the same plans."""
    module, source = Wide().double(), TensorSequence(*steps, weight=weight)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    tbptt = TBPTT(module, mean_loss, K1, K2, optimizer, ranks="all", time_batching=False, **how)
    times: list[int] = []
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(action="ignore"):
        patch.setattr(WindowCosts, "_measured", noting(WindowCosts._measured, times, fails=fails))
        patch.setattr(window_costs, "Limits", partial(window_costs.Limits, max_seconds=0.2))
        patch.setattr(SharedCosts, "_seconds", lambda _: 1.0 + rank)
        plans = [str(window.plan) for window in Trainer(tbptt, source).windows()]
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, (len(times), plans[1:]))
    return [number for number, _ in told], all(each == plans[1:] for _, each in told)


def noting(measure: Any, times: list[int], *, fails: bool) -> Any:
    def measured(costs: Any, request: Any, limits: Any) -> Any:
        times.append(1)
        if fails:
            raise torch.OutOfMemoryError("no memory, as if")
        return measure(costs, request, limits)

    return measured


def check_costs_are_measured_once(rank: int, count: int, *, all_of_it: bool = False) -> None:
    """By the slowest of ranks that run the same steps under the same budget."""
    same, budget = steps_of(0), {"memory_budget": "40MiB"}
    assert measured_by(rank, same, **budget) == ([0, 1], True)
    assert measured_by(rank, steps_of(rank), **budget)[0] == [1, 1]
    if all_of_it:
        assert measured_by(rank, same) == ([0, 1], True)
        assert measured_by(rank, same, memory_budget=f"{30 + rank}MiB")[0] == [1, 1]
        assert measured_by(rank, same, **(budget if rank else {"strategy": "sqrt"}))[0] == [0, 1]
    late = torch.ones(STEPS, dtype=torch.float64)
    late[:K1] = rank  # a first window without a loss needs no costs
    assert measured_by(rank, same, late, **budget)[0] == [1, 1]
    assert measured_by(rank, same, fails=rank == 1, **budget)[0] == [1, 1]
    with pytest.raises(InfeasibleBudgetError) as caught:  # on both, and of neither the other waits
        measured_by(rank, same, memory_budget="1MiB")
    told: list[Any] = [None] * count
    dist.all_gather_object(told, caught.value.smallest_budget_bytes)
    assert told[0] == told[1]


def check_costs_of_the_slowest(rank: int, count: int) -> None:
    """Costs that were measured on one rank hold the budgets of all."""
    slowest, sent = count - 1, [None]
    if rank == slowest:
        sent = [measure_costs(Wide().double(), mean_loss, *steps_of(rank))]
    dist.broadcast_object_list(sent, src=slowest)
    check_budgets(rank, count, [(nn.Identity(), torch.optim.Adam, {"costs": sent[0]})])
