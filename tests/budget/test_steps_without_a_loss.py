"""A budget knows that leaves before the new steps make no losses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tbptt_ckpt import TBPTT, TensorSequence, measure_costs, simulate

pytestmark = pytest.mark.times_the_module


class Readout(nn.Module):
    """Outputs that are many times as large as the state."""

    def __init__(self, classes=2000):
        super().__init__()
        self.lstm, self.out = nn.LSTM(8, 16), nn.Linear(16, classes)

    def forward(self, x, state):
        h, state = self.lstm(x, state)
        return self.out(h), state


def test_steps_without_a_loss_are_not_planned_as_if_they_had_one():
    """The second leaf of 32 steps has 24 losses; as if it had 32 it would take a third more."""
    torch.manual_seed(0)
    module, steps = Readout(), 160
    inputs, targets = torch.randn(steps, 4, 8), torch.randint(2000, (steps, 4))

    def cross_entropy(logits, targets):
        return nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten())

    options = {"per_step": False, "strategy": "uniform:32", "memory_budget": "1GiB"}
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    tbptt = TBPTT(module, cross_entropy, 32, 104, optimizer, **options)
    measured = [w for w in tbptt.windows(TensorSequence(inputs, targets)) if w.peak_bytes]
    full = [window for window in measured if window.stop - window.start == 104]
    assert len(full) > 1
    for window in full:
        assert window.plan.predicted_peak_bytes == pytest.approx(window.peak_bytes, rel=0.03)
    schedule, costs = (
        full[-1].plan.schedule,
        measure_costs(module, cross_entropy, inputs[:104], targets[:104], per_step=False),
    )
    apart = simulate(schedule, costs, loss_start=full[-1].new_start).peak_bytes
    assert simulate(schedule, costs).peak_bytes > 1.15 * apart
