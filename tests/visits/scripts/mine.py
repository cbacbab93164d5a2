"""Visit 4: somebody's own model, for the commands."""

import torch
from torch import nn

from tbptt_ckpt import Workload


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.readout = nn.LSTMCell(8, 16), nn.Linear(16, 1)

    def forward(self, x, state):
        h, c = self.cell(x, state)
        return self.readout(h), (h, c)


def make():
    return Workload(
        module=Cell(),
        loss_fn=nn.MSELoss(),
        inputs=torch.randn(64, 4, 8),
        targets=torch.randn(64, 4, 1),
        init_state=(torch.zeros(4, 16), torch.zeros(4, 16)),
    )
