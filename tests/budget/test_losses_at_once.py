"""Losses are called on many steps at once in whatever form steps run, and whatever was measured."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, InfeasibleBudgetError, TensorSequence
from tbptt_ckpt.module import Recurrent

pytestmark = pytest.mark.times_the_module
NUM_STEPS, LANES, WIDTH = 150, 4, 96


def test_a_form_of_which_one_step_fits_leaves_losses_of_many_steps_to_the_others() -> None:
    """The kernel of torch's `nn.LSTM` copies its weights: more than a step finds no room."""
    torch.manual_seed(0)
    module = Recurrent(nn.LSTMCell(WIDTH, WIDTH), readout=nn.Linear(WIDTH, 8))
    data = TensorSequence(torch.randn(NUM_STEPS, LANES, WIDTH), torch.randn(NUM_STEPS, LANES, 8))
    calls = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        calls.append(len(output))
        return nn.functional.mse_loss(output, target)

    def within(budget_bytes: int) -> TBPTT:
        return TBPTT(module, loss, NUM_STEPS, NUM_STEPS, None, memory_budget=budget_bytes)

    with pytest.raises(InfeasibleBudgetError) as refused:
        within(1).train(data)
    assert refused.value.smallest_budget_bytes is not None
    found = sum(parameter.nbytes for parameter in module.parameters())  # by later sequences
    tbptt = within(int(1.5 * (refused.value.smallest_budget_bytes - found)))
    tbptt.train(data)
    calls.clear()
    (window,) = tbptt.windows(data)
    assert window.plan.longest_leaf > 1
    assert len(calls) < NUM_STEPS / 2
