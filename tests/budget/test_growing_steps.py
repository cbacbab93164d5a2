"""A budget holds over sequences that have more lanes, or features, than those before them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from tbptt_ckpt import TBPTT, Batches, InfeasibleBudgetError, Snapshots, Trainer
from tbptt_ckpt.budget import growing

STEPS, WIDTH = 96, 32
BUDGET = 1_500_000


def batches(*lanes: int) -> Batches:
    torch.manual_seed(0)
    shapes = [(n, STEPS, WIDTH) for n in lanes]
    return Batches([(torch.randn(s), torch.randn(s)) for s in shapes], time_dim=1)


def engine(module: nn.Module, budget: int = BUDGET) -> TBPTT:
    optimizer = torch.optim.Adam(module.parameters())
    return TBPTT(module, mse_loss, 48, STEPS, optimizer, memory_budget=budget, measure_memory=True)


def layer() -> nn.Module:
    torch.manual_seed(1)
    return nn.LSTM(WIDTH, WIDTH, batch_first=True)


def cell() -> nn.Module:
    torch.manual_seed(1)
    return nn.LSTMCell(WIDTH, WIDTH)


@pytest.mark.parametrize(
    ("make", "lanes"),
    [
        (layer, (1, 16, 4)),
        pytest.param(layer, (1, 1, 16, 16, 4, 24), marks=pytest.mark.exhaustive),
        pytest.param(cell, (1, 1, 16, 16, 4, 24), marks=pytest.mark.exhaustive),
    ],
)
def test_no_window_of_more_lanes_exceeds_the_budget(make: Any, lanes: tuple[int, ...]) -> None:
    trainer = Trainer(engine(make()), batches(*lanes))
    found = [(w.num_tokens // 48, w.peak_bytes, w.plan) for w in trainer.windows()]
    assert len(found) == 2 * len(lanes)
    assert all(peak <= BUDGET for _, peak, _ in found)
    largest = sorted(set(lanes) - {4})
    assert trainer.tbptt.parts.budget.times_made == len(largest), "4 are planned as 16 are"
    plans = {count: plan for count, _, plan in found}
    assert plans[1].longest_leaf > plans[16].longest_leaf


def test_what_more_lanes_cannot_have_is_refused_before_their_first_update() -> None:
    trainer = Trainer(engine(layer(), 400_000), batches(1, 64))
    windows = trainer.windows()
    before = [next(windows) for _ in range(2)]
    weights = [p.detach().clone() for p in trainer.tbptt.parts.parameters]
    with pytest.raises(InfeasibleBudgetError):
        next(windows)
    assert len(before) == 2
    assert all(map(torch.equal, weights, trainer.tbptt.parts.parameters))


def test_a_run_goes_on_with_what_it_knew_of_its_steps(tmp_path: Path) -> None:
    def trainer() -> Trainer:
        snapshots = Snapshots(directory=tmp_path, every_steps=48, keep=99)
        return Trainer(engine(layer()), batches(2, 16, 2), snapshots=snapshots)

    whole = trainer()
    for _ in whole.windows():
        pass
    weights = [p.detach().clone() for p in whole.tbptt.parts.parameters]
    assert (tmp_path / f"step-{STEPS}").exists(), "with costs, before the first update of 16 lanes"
    for path in tmp_path.glob("step-*"):
        if int(path.name[5:]) > STEPS + 48:
            path.rename(tmp_path / f"later-{path.name}")
    resumed = trainer()
    assert resumed.resume()
    resumed.train()
    assert resumed.tbptt.parts.budget.times_made == 1, "nothing was measured again"
    assert all(map(torch.equal, weights, resumed.tbptt.parts.parameters))
    assert resumed.tbptt.parts.budget.costs == whole.tbptt.parts.budget.costs
    json.dumps(resumed.tbptt.parts.budget.state_dict())


def test_steps_are_compared_tensor_by_tensor() -> None:
    small, large = [[4, 2, 8], [8, 2]], [[4, 3, 8], [8, 3]]
    assert growing.within(small, large)
    assert not growing.within(large, small)
    assert not growing.within([[8, 2, 8], [8, 2]], small)
    assert not growing.within(small, small[:1])
    assert not growing.within([[4, 1, 9], [8, 1]], large)
