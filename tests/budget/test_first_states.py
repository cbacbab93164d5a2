"""A first state may take less memory than those that steps reach: a budget knows it at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from grids import later
from torch import nn

from tbptt_ckpt import TBPTT, InfeasibleBudgetError, TensorSequence

LANES, WIDTH, STEPS = 8, 64, 24
MODULES: dict[str, Callable[[], nn.Module]] = {
    "cell": lambda: nn.LSTMCell(8, WIDTH),
    "layer": lambda: nn.LSTM(8, WIDTH),
}


def _of_one_row(shape: tuple[int, ...]) -> Any:
    row = torch.zeros(WIDTH)
    return row.expand(shape), row.expand(shape)


FIRST: dict[str, Callable[[tuple[int, ...]], Any]] = {
    "own tensors": lambda shape: (torch.zeros(shape), torch.zeros(shape)),
    "none": lambda shape: None,
    "one tensor twice": lambda shape: (torch.zeros(shape),) * 2,
    "parts of one tensor": lambda shape: tuple(torch.zeros(2, *shape)),
    "one row for all lanes": _of_one_row,
}


def train(kind: str, first: str, budget: int, **options: Any) -> list[int]:
    """Peaks of the windows."""
    torch.manual_seed(0)
    module = MODULES[kind]()
    data = TensorSequence(torch.randn(STEPS, LANES, 8), torch.randn(STEPS, LANES, WIDTH))
    state = FIRST[first]((LANES, WIDTH) if kind == "cell" else (1, LANES, WIDTH))
    optimizer = torch.optim.Adam(module.parameters())
    options |= {"memory_budget": budget, "measure_memory": True}
    tbptt = TBPTT(module, nn.functional.mse_loss, 4, 8, optimizer, **options)
    return [window.peak_bytes for window in tbptt.windows(data, state)]


def smallest(*arguments: Any, **options: Any) -> int:
    with pytest.raises(InfeasibleBudgetError) as refused:
        train(*arguments, budget=1, **options)
    assert refused.value.smallest_budget_bytes is not None
    return refused.value.smallest_budget_bytes


@pytest.mark.parametrize("strategy", ["optimal", later("revolve:4"), later("uniform:2")])
@pytest.mark.parametrize("overlap", ["refresh", later("stale")])
@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("kind", MODULES)
def test_the_budget_that_a_refusal_names_is_enough_for_every_window(
    kind: str, first: str, overlap: str, strategy: str
) -> None:
    options = {"strategy": strategy, "overlap": overlap}
    budget = smallest(kind, first, **options)
    assert max(train(kind, first, budget, **options)) <= budget
    state_bytes = 2 * 4 * LANES * WIDTH
    own = smallest(kind, "own tensors", **options)
    assert own - 64 <= budget + state_bytes <= own + 2 * state_bytes
