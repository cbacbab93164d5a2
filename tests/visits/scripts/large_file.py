"""Visit 5: a long recording in a .npy file, foretold step by step."""

import torch
from torch import nn

from tbptt_ckpt import TBPTT, ArraySequence, LaneSource
from tbptt_ckpt.data import map_file

signal = map_file("signal.npy")[:, None]
source = LaneSource(ArraySequence(signal, next_step=True, dtype=torch.float32), lanes=32)
module = nn.GRU(1, 1)
optimizer = torch.optim.Adam(module.parameters(), lr=0.01)

tbptt = TBPTT(module, nn.MSELoss(), k1=50, k2=100, optimizer=optimizer)
result = tbptt.train(source)
print(result)
