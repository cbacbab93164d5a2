"""Leaves longer than any that was measured at first: budgets hold however little was measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import tbptt_ckpt.budget.calibrate as calibrate
import tbptt_ckpt.budget.window_costs as window_costs
from tbptt_ckpt import TBPTT, Costs, InfeasibleBudgetError, TensorSequence
from tbptt_ckpt.budget.longer import length_to_meter
from tbptt_ckpt.schedule.curves import Curve, higher

pytestmark = pytest.mark.times_the_module
EXHAUSTIVE = pytest.mark.exhaustive


class Tagger(nn.Module):
    """What its GRU's forward takes overtakes what its backward takes, from 21 steps on."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.embedding, self.rnn = nn.Embedding(20, rnn.input_size), rnn
        self.out = nn.Linear(rnn.hidden_size, 5)

    def forward(self, x, state):
        y, state = self.rnn(self.embedding(x), state)
        return self.out(y), state


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.cell, self.out = (
            nn.Embedding(20, 16),
            nn.GRUCell(16, 32),
            nn.Linear(32, 5),
        )

    def forward(self, x, state):
        state = self.cell(self.embedding(x), state)
        return self.out(state), state


MODULES = {
    "nn.GRU": lambda: Tagger(nn.GRU(16, 32)),
    "nn.LSTM of 3 layers": lambda: Tagger(nn.LSTM(16, 32, 3)),
    "nn.RNN": lambda: Tagger(nn.RNN(16, 32)),
    "a loop over cells": Cell,
}
BUDGETS = [150_000, 300_000, 614_400, 1_500_000, 4_000_000]
CASES = [
    pytest.param(name, lanes, budget, id=f"{name}, {lanes} lanes, {budget}", marks=marks)
    for name in MODULES
    for lanes in (4, 32)
    for budget in BUDGETS
    if budget >= {"nn.LSTM of 3 layers": 700_000}.get(name, 0) * (1 + lanes // 32)
    and (lanes == 4 or budget >= 300_000)
    for marks in ([] if (name, lanes, budget) == ("nn.GRU", 4, 300_000) else [EXHAUSTIVE],)
]


@pytest.fixture(params=[0.0, pytest.param(1.6, marks=EXHAUSTIVE)])
def measured_seconds(request, monkeypatch):
    """A machine that leaves so little time for measuring, on which long leaves pay."""

    def limits(*args, **kwargs):
        return replace(calibrate.Limits(*args, **kwargs), max_seconds=request.param)

    monkeypatch.setattr(window_costs, "Limits", limits)
    monkeypatch.setattr(calibrate, "seconds_curve", lambda samples: Curve.linear(1.0, 1e-3))


def cross_entropy(logits, targets):
    return nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten())


@pytest.mark.usefixtures("measured_seconds")
@pytest.mark.parametrize(("name", "lanes", "budget"), CASES)
def test_no_window_exceeds_its_budget(name, lanes, budget):
    torch.manual_seed(0)
    module = MODULES[name]()
    data = TensorSequence(torch.randint(20, (250, lanes)), torch.randint(5, (250, lanes)))
    options = {
        "memory_budget": budget,
        "measure_memory": True,
        "per_step": name == "a loop over cells",
    }
    tbptt = TBPTT(module, cross_entropy, 50, 200, torch.optim.Adam(module.parameters()), **options)
    windows = list(tbptt.windows(data))
    assert [w.index for w in windows if w.peak_bytes > budget] == []
    if max(window.plan.longest_leaf for window in windows) < 200:  # a longer one was possible
        assert max(window.peak_bytes for window in windows) > 0.8 * budget


@pytest.mark.usefixtures("measured_seconds")
def test_a_leaf_in_two_pieces_whose_gradients_meet_is_within_its_budget():
    """Of two steps the second alone has a loss: each gives a weight its gradient, and a sum."""
    torch.manual_seed(0)
    module = MODULES["nn.GRU"]()
    data = TensorSequence(torch.randint(20, (150, 4)), torch.randint(5, (150, 4)))
    options = {"memory_budget": 150_000, "measure_memory": True, "per_step": False}
    tbptt = TBPTT(module, cross_entropy, 50, 200, torch.optim.Adam(module.parameters()), **options)
    assert [w.index for w in tbptt.windows(data) if w.peak_bytes > 150_000] == []


@pytest.mark.parametrize("rnn", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(
    "above", [0, *(pytest.param(more, marks=EXHAUSTIVE) for more in (15_000, 35_000))]
)
def test_the_smallest_budgets_hold_that_leave_no_room_to_measure_two_steps(rnn, above):
    torch.manual_seed(0)
    module = Tagger(rnn(64, 64))
    data = TensorSequence(torch.randint(20, (60, 8)), torch.randint(5, (60, 8)))

    def windows(budget):
        optimizer, options = torch.optim.Adam(module.parameters()), {"measure_memory": True}
        options |= {"memory_budget": budget, "per_step": False}
        return TBPTT(module, cross_entropy, 10, 30, optimizer, **options).windows(data)

    with pytest.raises(InfeasibleBudgetError) as refused:
        next(windows(1))
    budget = refused.value.smallest_budget_bytes + above
    assert [w.index for w in windows(budget) if w.peak_bytes > budget] == []


@pytest.mark.parametrize(
    ("planned", "available", "room", "metered"),
    [
        *((22, 60, 1e9, 24), (22, 22, 1e9, 22), (60, 60, 1e9, 42), (60, 60, 300.0, 40)),
        *((22, 60, 120.0, 22), (60, 60, 120.0, None), (22, 60, 115.0, None)),
    ],
)
def test_a_leaf_hardly_longer_than_metered_ones_is_metered_too(planned, available, room, metered):
    """Costs are raised to the most they may be only where there is no room."""
    line = Curve.linear(5.0, 5.0)
    costs = replace(
        Costs(
            state_bytes=0,
            leaf_bytes=line,
            leaf_seconds=line,
            advance_bytes=line,
            advance_seconds=line,
        ),
        metered_steps=21,
    )
    assert length_to_meter(costs, planned, available, room) == metered


class LSTMLoop(nn.Module):
    """What its backward takes beside a leaf's graph grows with the leaf, where it is batched."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(24, 48)

    def forward(self, x, state):
        state = self.cell(x, state)
        return state[0], state


@pytest.mark.usefixtures("measured_seconds")
@pytest.mark.parametrize("k2", [None, pytest.param(60, marks=EXHAUSTIVE)])
def test_leaves_that_no_room_was_left_to_measure_are_within_the_budget(k2):
    data = TensorSequence(torch.randn(83, 8, 24), torch.randn(83, 8, 48))

    def windows(budget):
        torch.manual_seed(0)
        module = LSTMLoop()
        options = {"measure_memory": True, "memory_budget": budget, "time_batching": True}
        optimizer = torch.optim.Adam(module.parameters())
        return TBPTT(module, nn.functional.mse_loss, 20, k2, optimizer, **options).windows(data)

    with pytest.raises(InfeasibleBudgetError) as refused:
        next(windows(1))
    for factor in (1.0, 1.01, 1.03):
        budget = int(factor * refused.value.smallest_budget_bytes)
        above = {w.index: w.peak_bytes - budget for w in windows(budget)}
        assert max(above.values()) <= 0, (factor, above)


@pytest.mark.parametrize("name", [name for name in MODULES if name != "a loop over cells"])
def test_what_is_checked_once_for_a_module_takes_no_more_than_its_window(name):
    module = MODULES[name]()
    data = TensorSequence(torch.randint(20, (10, 4)), torch.randint(5, (10, 4)))
    options = {"strategy": "uniform:5", "measure_memory": True, "per_step": False}
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    tbptt = TBPTT(module, cross_entropy, 10, 10, optimizer, memory_budget="4MiB", **options)
    (window,) = tbptt.windows(data)
    assert window.peak_bytes <= 1.03 * window.plan.predicted_peak_bytes


def test_the_higher_of_two_curves_is_the_higher_one_beyond_their_points_too():
    flat, steep = Curve.linear(100.0, 1.0), Curve(((1, 2.0), (2, 4.0)))
    both = higher(flat, steep)
    for steps in range(1, 400):
        assert max(flat(steps), steep(steps)) <= both(steps) <= max(flat(steps), steep(steps)) + 1
