"""One small run, and the weights it leaves."""

from __future__ import annotations

import torch
from cases import mean_loss, random_data
from torch import nn

from tbptt_ckpt import TBPTT, TensorSequence

NUM_STEPS, K1, K2 = 13, 3, 7
STRATEGIES = ("retain", "uniform:2", "revolve:2")


def data(num_steps: int = NUM_STEPS) -> TensorSequence:
    return TensorSequence(*random_data(num_steps))


def run(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    TBPTT(module, mean_loss, K1, K2, optimizer).train(data())
