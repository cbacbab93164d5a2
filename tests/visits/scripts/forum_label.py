"""Visit 7: one label for each sequence, read at its last step."""

import torch
import torch.nn.functional as F
from torch import nn

from tbptt_ckpt import TBPTT, TensorSequence


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru, self.readout = nn.GRU(8, 16), nn.Linear(16, 5)

    def forward(self, x, state):
        y, state = self.gru(x, state)
        return self.readout(y), state


steps, lanes = 90, 4
inputs, label = torch.randn(steps, lanes, 8), torch.randint(0, 5, (lanes,))
module = Classifier()
optimizer = torch.optim.Adam(module.parameters(), lr=0.01)

tbptt = TBPTT(
    module,
    lambda logits, target: F.cross_entropy(logits.flatten(0, 1), target.flatten()),
    k1=20,
    k2=None,
    optimizer=optimizer,
    per_step=False,
)
last = torch.arange(steps) == steps - 1
result = tbptt.train(TensorSequence(inputs, label.expand(steps, lanes), weight=last))
print(result)
