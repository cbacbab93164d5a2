"""Visit 7: the forum's script, with its class imported."""

import torch
from torch import nn

from tbptt_ckpt import TBPTT


class MyMod(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(20, 20)

    def forward(self, x, state):
        new_state = torch.tanh(self.lin(x + state))
        return new_state, new_state


seq_len, batch_size = 30, 4
inputs, targets = torch.randn(seq_len, batch_size, 20), torch.randn(seq_len, batch_size, 20)
module = MyMod()
optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
first = torch.zeros(batch_size, 20)

tbptt = TBPTT(module, nn.MSELoss(), 5, 9, optimizer)
result = tbptt.train(list(zip(inputs, targets, strict=True)), first)
print(result)
