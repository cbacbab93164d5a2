"""What a state hands on unchanged, such as an encoder's memory, is kept once for all states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, TensorSequence

WIDTH, LANES, STEPS, ROWS = 8, 2, 40, 1000
BANK_BYTES = LANES * ROWS * WIDTH * 8


class Reader(nn.Module):
    """A cell that looks into a bank, which its state hands on or makes anew."""

    def __init__(self, *, anew: bool = False, own: Tensor | None = None) -> None:
        super().__init__()
        self.cell, self.query = nn.GRUCell(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.anew, self.own = anew, own

    def forward(self, x: Tensor, state: Any) -> Any:
        h, bank = (torch.zeros(LANES, WIDTH).double(), self.own) if state is None else state
        weights = torch.softmax(torch.einsum("bd,btd->bt", self.query(h), bank), -1)
        h = self.cell(x + torch.einsum("bt,btd->bd", weights, bank), h)
        return h, (h, 0.99 * bank if self.anew else bank)


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(STEPS, LANES, WIDTH).double(), torch.randn(STEPS, LANES, WIDTH).double()


def make_bank(*, learned: bool = False) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(LANES, ROWS, WIDTH, dtype=torch.float64, requires_grad=learned)


def make(**options: Any) -> Reader:
    torch.manual_seed(0)
    return Reader(**options).double()


def by_hand(module: Reader, bank: Tensor) -> list[Tensor]:
    inputs, targets = data()
    state: Any = (torch.zeros(LANES, WIDTH).double(), bank)
    loss = torch.zeros((), dtype=torch.float64)
    for x, target in zip(inputs, targets, strict=True):
        y, state = module(x, state)
        loss = loss + nn.functional.mse_loss(y, target)
    leaves = [*module.parameters(), *([bank] if bank.requires_grad else [])]
    return list(torch.autograd.grad(loss / STEPS, leaves))


def run(module: Reader, state: Any, **options: Any) -> Any:
    tbptt = TBPTT(module, nn.functional.mse_loss, STEPS, STEPS, measure_memory=True, **options)
    (window,) = tbptt.windows(TensorSequence(*data()), state)
    return window


@pytest.mark.parametrize("strategy", ["uniform:5", "step", "revolve:4"])
@pytest.mark.parametrize("learned", [False, True])
def test_kept_states_share_it(strategy: str, learned: bool) -> None:
    module, bank = make(), make_bank(learned=learned)
    expected = by_hand(module, bank)
    window = run(module, (torch.zeros(LANES, WIDTH).double(), bank), strategy=strategy)
    found = [p.grad for p in (*module.parameters(), *([bank] if learned else []))]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
    other = make()
    retained = run(other, (torch.zeros(LANES, WIDTH).double(), make_bank()), strategy="retain")
    assert window.plan.num_boundaries >= 3
    assert window.peak_bytes < retained.peak_bytes  # which holds no state but the first


def test_it_is_kept_once_where_the_module_brings_it() -> None:
    bank = make_bank()
    window = run(make(own=bank), None, strategy="uniform:5")
    assert window.plan.num_boundaries >= 7
    assert window.peak_bytes < 10 * BANK_BYTES


def test_what_is_made_anew_is_kept_for_each() -> None:
    module, bank = make(anew=True), make_bank()
    expected = by_hand(module, bank)
    window = run(module, (torch.zeros(LANES, WIDTH).double(), bank), strategy="uniform:5")
    found = [p.grad for p in module.parameters()]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
    assert window.peak_bytes > window.plan.num_boundaries * BANK_BYTES


@pytest.mark.parametrize("given", [True, False])
def test_budgets_count_it_once(given: bool) -> None:
    bank = make_bank()
    module = make(own=None if given else bank)
    state = (torch.zeros(LANES, WIDTH).double(), bank) if given else None
    budget = 12 * BANK_BYTES
    window = run(module, state, memory_budget=budget, strategy="uniform:3")
    assert window.peak_bytes <= budget
    assert window.plan.num_boundaries >= 12
    predicted = window.plan.predicted_peak_bytes
    assert (
        window.peak_bytes <= predicted <= window.peak_bytes + (1.1 if given else 2.1) * BANK_BYTES
    )
