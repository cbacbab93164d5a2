"""What first steps alone take, as libraries load, is no part of what is measured."""

from __future__ import annotations

import logging
import types

import pytest
import torch
from torch import nn

from tbptt_ckpt import TBPTT, TensorSequence, measure_costs
from tbptt_ckpt.budget import calibrate, forms, probe

STEPS, WIDTH = 24, 8
STEP_SECONDS, COLD_SECONDS = 1e-4, 30.0


class Clock:
    """Passes while a module runs, and nowhere else."""

    def __init__(self, monkeypatch, cold_seconds):
        self.now, self._cold = 0.0, dict.fromkeys(("forward", "backward"), cold_seconds)
        reading = types.SimpleNamespace(perf_counter=lambda: self.now)
        for module in (calibrate, probe, forms):
            monkeypatch.setattr(module, "time", reading)

    def runs(self, what):
        self.now += STEP_SECONDS + self._cold.pop(what, 0.0)


class Timed(nn.Module):
    """A cell whose first forward and first backward take as long as loading libraries does."""

    def __init__(self, clock, width):
        super().__init__()
        self.cell, self.clock = nn.LSTMCell(width, width), clock

    def forward(self, x, state):
        self.clock.runs("forward")
        h, c = self.cell(x, state)
        if h.requires_grad:
            h.register_hook(lambda _: self.clock.runs("backward"))
        return h, (h, c)


def data(width):
    torch.manual_seed(0)
    return torch.randn(STEPS, 2, width), torch.randn(STEPS, 2, width)


def test_a_cold_start_shortens_no_measurement(monkeypatch):
    found = []
    for cold_seconds in (0.0, COLD_SECONDS):
        module = Timed(Clock(monkeypatch, cold_seconds), WIDTH)
        costs = measure_costs(module, nn.functional.mse_loss, *data(WIDTH))
        found.append((costs.metered_steps, costs.leaf_seconds, costs.advance_seconds))
    warm, cold = found
    assert warm[0] == cold[0] == STEPS
    for one, other in zip(warm[1:], cold[1:], strict=True):
        assert [steps for steps, _ in one.points] == [steps for steps, _ in other.points]
        assert [one(n) for n in (1, 20)] == pytest.approx([other(n) for n in (1, 20)])


def test_a_cold_start_leaves_time_to_weigh_both_forms(monkeypatch, caplog):
    width = 256  # wide enough to be batched over time by "auto"
    module = Timed(Clock(monkeypatch, COLD_SECONDS), width)
    run = TBPTT(module, nn.functional.mse_loss, STEPS, STEPS, memory_budget="1GiB")
    with caplog.at_level(logging.INFO, logger="tbptt_ckpt"):
        next(run.windows(TensorSequence(*data(width))))
    assert "(predicted: " in caplog.text
