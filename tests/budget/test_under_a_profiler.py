"""While a torch profiler is active nothing can be measured: windows go on, and one line says so."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, Costs, TensorSequence

WIDTH, LANES, STEPS, K1, K2 = 8, 3, 60, 10, 20


def start(**options: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    module = nn.LSTMCell(WIDTH, WIDTH).double()
    inputs, targets = torch.randn(2, STEPS, LANES, WIDTH).double()
    optimizer = torch.optim.Adam(module.parameters())
    tbptt = TBPTT(module, nn.functional.mse_loss, K1, K2, optimizer, **options)
    return module, tbptt.windows(TensorSequence(inputs, targets))


def weights_of(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.times_the_module
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"memory_budget": "1MiB"},
        {"memory_budget": "1MiB", "strategy": "optimal", "measure_memory": True},
        {"memory_budget": "1MiB", "strategy": "uniform:4"},
        {
            "memory_budget": "1MiB",
            "costs": Costs.linear(state_bytes=400, step_bytes=3000),
        },
        {"strategy": "sqrt", "measure_memory": True},
    ],
)
def test_training_goes_on_inside_one(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    expected, running = start(strategy="retain")
    list(running)
    module, running = start(**options)
    with torch.profiler.profile(), caplog.at_level(logging.WARNING, logger="tbptt_ckpt"):
        windows = list(running)
    assert [window.peak_bytes for window in windows] == [None] * (STEPS // K1)
    assert ["profiler is active" in record.getMessage() for record in caplog.records] == [True]
    torch.testing.assert_close(weights_of(module), weights_of(expected), rtol=1e-9, atol=1e-12)


def test_windows_before_and_after_one_are_measured(caplog: pytest.LogCaptureFixture) -> None:
    """A user profiles three windows in the middle, as `schedule` of torch's profiler does."""
    budget = 120_000
    expected, running = start(strategy="retain")
    list(running)
    module, running = start(memory_budget=budget, measure_memory=True)
    with caplog.at_level(logging.WARNING, logger="tbptt_ckpt"):
        windows = [next(running)]
        with torch.profiler.profile():
            windows += [next(running), next(running)]
        windows += list(running)
    assert [window.peak_bytes is None for window in windows] == [False, True, True] + [False] * 3
    assert all(window.plan.strategy == "optimal" for window in windows)
    assert all(window.plan.predicted_peak_bytes <= budget for window in windows)
    assert all(window.peak_bytes <= budget for window in windows if window.peak_bytes is not None)
    assert len(caplog.records) == 1
    torch.testing.assert_close(weights_of(module), weights_of(expected), rtol=1e-9, atol=1e-12)


def test_a_budget_is_looked_at_once_the_profiler_has_ended() -> None:
    _, running = start(memory_budget=120_000, measure_memory=True)
    with torch.profiler.profile():
        first = next(running)
    assert first.plan.predicted_peak_bytes is None
    later = list(running)
    assert all(window.plan.strategy == "optimal" for window in later)
    assert all(window.peak_bytes <= 120_000 for window in later)
