"""States whose tensors change their shapes with time: nothing measured stands for later steps."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, ArgumentError, TensorSequence, measure_costs

WIDTH, LANES, STEPS, K1, K2 = 6, 3, 40, 10, 20


class Attention(nn.Module):
    """A cell that looks at its states of the past, one more in every so many steps."""

    def __init__(self, every: int, at_most: int = STEPS) -> None:
        super().__init__()
        self.cell, self.query = nn.GRUCell(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.every, self.at_most = every, at_most

    def forward(self, x: Tensor, state: Any) -> Any:
        h, memory, step = state
        if step % self.every == self.every - 1:
            memory = torch.cat([memory, h.unsqueeze(1)], 1)[:, -self.at_most :]
        weights = torch.softmax(torch.einsum("bd,btd->bt", self.query(h), memory), -1)
        h = self.cell(x + torch.einsum("bt,btd->bd", weights, memory), h)
        return h, (h, memory, step + 1)


def first_state() -> Any:
    return torch.zeros(LANES, WIDTH).double(), torch.zeros(LANES, 1, WIDTH).double(), 0


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(STEPS, LANES, WIDTH).double(), torch.randn(STEPS, LANES, WIDTH).double()


def gradients_by_hand(module: nn.Module) -> list[list[Tensor]]:
    """Of each window, from the constant state where it starts."""
    inputs, targets = data()
    found = []
    for stop in range(K1, STEPS + 1, K1):
        start, state = max(0, stop - K2), first_state()
        with torch.no_grad():
            for x in inputs[:start]:
                _, state = module(x, state)
        losses = []
        for x, target in zip(inputs[start:stop], targets[start:stop], strict=True):
            y, state = module(x, state)
            losses.append(nn.functional.mse_loss(y, target))
        loss = sum(losses[-K1:]) / K1
        found.append(list(torch.autograd.grad(loss, list(module.parameters()))))
    return found


@pytest.mark.times_the_module
@pytest.mark.parametrize(("every", "at_most"), [(1, STEPS), (4, STEPS), (1, 5)])
@pytest.mark.parametrize(
    ("options", "cut"),
    [
        ({}, "as by strategy='sqrt'$"),
        ({"strategy": "optimal"}, "as by strategy='sqrt'$"),
        ({"memory_budget": "1GiB"}, "as by strategy='sqrt', and memory_budget is not looked at"),
        (
            {"memory_budget": "1GiB", "strategy": "uniform:3"},
            "as by uniform:3, and memory_budget is not looked at",
        ),
    ],
)
def test_they_are_cut_by_a_fixed_strategy_and_one_line_says_so(
    every: int, at_most: int, options: dict[str, Any], cut: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    module = Attention(every, at_most).double()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    tbptt = TBPTT(module, nn.functional.mse_loss, K1, K2, optimizer, **options)
    sequence, found = TensorSequence(*data()), []
    with caplog.at_level(logging.WARNING, logger="tbptt_ckpt"):
        for _ in tbptt.windows(sequence, first_state()):
            found.append([p.grad.clone() for p in module.parameters()])
    assert len(caplog.records) == 1
    assert caplog.records[0].getMessage().startswith("the state's tensors change from step to step")
    assert re.search(cut, caplog.records[0].getMessage())
    for window, expected in zip(found, gradients_by_hand(module), strict=True):
        torch.testing.assert_close(window, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("every", [1, 4])
def test_no_costs_can_be_measured(every: int) -> None:
    module = Attention(every).double()
    with pytest.raises(ArgumentError, match="no measured step stands for later ones"):
        measure_costs(module, nn.functional.mse_loss, *data(), first_state())
