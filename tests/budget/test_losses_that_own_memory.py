"""Some of torch's losses are numbers that own as much memory as what they were made from."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tbptt_ckpt import TBPTT, InfeasibleBudgetError, TensorSequence

NUM_STEPS, LANES, WIDTH = 40, 4, 256
MODULES = {"RNNCell": nn.RNNCell, "nn.LSTM": nn.LSTM}
CASES = [
    ("RNNCell", True, F.mse_loss),
    pytest.param("RNNCell", False, F.mse_loss, marks=pytest.mark.exhaustive),
    pytest.param("RNNCell", True, F.smooth_l1_loss, marks=pytest.mark.exhaustive),
    ("RNNCell", True, lambda output, _: F.binary_cross_entropy(output**2, output.detach() ** 2)),
    ("nn.LSTM", True, F.mse_loss),
]


def above_budget(name, has_init, loss, budget_bytes):
    """The peak of each window, less the budget."""
    torch.manual_seed(0)
    module = MODULES[name](WIDTH, WIDTH)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    tbptt = TBPTT(module, loss, 5, 10, optimizer, memory_budget=budget_bytes, measure_memory=True)
    shape = NUM_STEPS, LANES, WIDTH
    source = TensorSequence(torch.randn(shape), torch.randn(shape))
    first = torch.zeros(LANES, WIDTH), torch.zeros(LANES, WIDTH)
    first = first[0] if name == "RNNCell" else tuple(each[None] for each in first)
    running = tbptt.windows(source, first if has_init else None)
    return [result.peak_bytes - budget_bytes for result in running]


@pytest.mark.parametrize(("name", "has_init", "loss"), CASES)
def test_the_smallest_budget_holds_while_a_leafs_loss_is_kept(name, has_init, loss):
    with pytest.raises(InfeasibleBudgetError) as refused:
        above_budget(name, has_init, loss, 1)
    smallest = refused.value.smallest_budget_bytes
    assert smallest is not None
    assert max(above_budget(name, has_init, loss, smallest)) <= 0
