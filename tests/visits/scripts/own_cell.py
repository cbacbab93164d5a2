"""Visit 1: an own LSTM cell on a long sequence."""

import torch
from torch import nn

from tbptt_ckpt import TBPTT, TensorSequence


class OwnCell(nn.Module):
    def __init__(self):
        super().__init__()
        self.gates = nn.Linear(8 + 16, 64)
        self.readout = nn.Linear(16, 1)

    def forward(self, x, state):
        h, c = state
        i, f, g, o = self.gates(torch.cat([x, h], dim=1)).chunk(4, dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return self.readout(h), (h, c)


inputs, targets = torch.randn(300, 4, 8), torch.randn(300, 4, 1)
module = OwnCell()
optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
first = torch.zeros(4, 16), torch.zeros(4, 16)

tbptt = TBPTT(module, nn.MSELoss(), k1=50, k2=100, optimizer=optimizer)
for window in tbptt.windows(TensorSequence(inputs, targets), init_state=first):
    print(window.stop, float(window.loss))
