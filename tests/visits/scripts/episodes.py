"""Visit 6: episodes of different lengths, one of which begins anew in its middle."""

import torch
from torch import nn

from tbptt_ckpt import TBPTT, LaneSource, TensorSequence

lengths = (40, 13, 27, 8, 31, 16)
episodes = [(torch.randn(length, 8), torch.randn(length, 16)) for length in lengths]
begins = torch.arange(40) == 25
sequences = [TensorSequence(*episodes[0], resets=begins)]
sequences += [TensorSequence(x, y) for x, y in episodes[1:]]
module = nn.GRUCell(8, 16)
optimizer = torch.optim.Adam(module.parameters(), lr=0.01)

tbptt = TBPTT(module, nn.MSELoss(), k1=10, k2=20, optimizer=optimizer)
for window in tbptt.windows(LaneSource(sequences, lanes=3)):
    print(window.stop, float(window.loss))
