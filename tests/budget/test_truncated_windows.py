"""`truncation="roulette"` within a memory budget: whatever is drawn, from the smallest on."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import OVERLAPS
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, InfeasibleBudgetError, TensorSequence, WindowResult
from tbptt_ckpt.schedule import Roulette

pytestmark = pytest.mark.times_the_module
STEPS, K1, K2, WIDTH, LANES = 220, 10, 80, 24, 4
BORDERS = K2 // K1 - 1
ORDER = (0, 3, 7, 1, 6, 2, 5, 4, 7, 0)  # of borders that windows cross


@dataclass(frozen=True)
class InTurn(Roulette):
    """Windows cross these numbers of borders in turn."""

    def number(self, window: int) -> float:
        return 0.9 * 0.5 ** next(islice(cycle(ORDER), window, None))


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.LSTMCell(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        h, c = self.cell(x, state)
        return self.out(h), (h, c)


def engine(segments: bool, **options: Any) -> TBPTT:
    torch.manual_seed(0)
    module: nn.Module = nn.LSTM(WIDTH, WIDTH) if segments else Loop()
    optimizer = torch.optim.Adam(module.parameters())
    return TBPTT(module, F.mse_loss, K1, K2, optimizer, truncation=InTurn(0.5), **options)


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("segments", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_the_smallest_budget_holds_for_every_draw(segments: bool, overlap: str) -> None:
    data = TensorSequence(torch.randn(STEPS, LANES, WIDTH), torch.randn(STEPS, LANES, WIDTH))
    budget, found = 1, list[WindowResult]()
    while not found:
        tbptt = engine(segments, overlap=overlap, memory_budget=budget, measure_memory=True)
        windows = tbptt.windows(data)
        try:
            found.append(next(windows))
        except InfeasibleBudgetError as error:
            budget = error.smallest_budget_bytes or 0
    found += windows  # none of which is refused
    assert all(window.peak_bytes <= budget for window in found)
    full = [window for window in found if window.new_start >= K2 - K1 and window.stop % K1 == 0]
    crossed = {(window.new_start - window.start) // K1 for window in full}
    assert crossed == {*range(BORDERS + 1)}
    plans = {(w.plan.num_steps, w.plan.lead_steps) for w in full}
    assert len(plans) == BORDERS + 1  # one for each draw, however many windows there are
    for window in full:
        assert window.plan.num_steps == window.stop - window.start
        assert window.plan.lead_steps == window.start - window.first
