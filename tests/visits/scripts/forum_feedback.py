"""Visit 7, the thread's second question: the output is the next input, all of it differentiated."""

import torch
from torch import nn

from tbptt_ckpt import TBPTT


class FeedsBack(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.readout = nn.GRUCell(3, 16), nn.Linear(16, 3)

    def forward(self, _, state):
        y, h = state
        h = self.cell(y, h)
        y = self.readout(h)
        return y, (y, h)


inputs, targets = [None] * 60, torch.randn(60, 4, 3)
module = FeedsBack()
optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
first = torch.zeros(4, 3), torch.zeros(4, 16)

tbptt = TBPTT(module, nn.MSELoss(), k1=60, k2=None, optimizer=optimizer)
result = tbptt.train([(None, target) for target in targets], first)
print(result)
