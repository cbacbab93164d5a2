"""The file that `tbptt-ckpt init` writes."""

STARTING_POINT = '''"""A workload for tbptt-ckpt: your module, its loss and its data.

    tbptt-ckpt plan --model THIS_FILE.py:make --budget 2GiB   how far back fits, and its price
    tbptt-ckpt profile --model THIS_FILE.py:make --k2 256     what each strategy takes
    tbptt-ckpt train --model THIS_FILE.py:make                train it
"""

import numpy as np
import torch
from torch import nn

from tbptt_ckpt import Workload


class Cell(nn.Module):
    """One step: (input [B, 1], state) -> (output [B, 1], state)."""

    def __init__(self, hidden):
        super().__init__()
        self.cell = nn.LSTMCell(1, hidden)
        self.readout = nn.Linear(hidden, 1)

    def forward(self, x, state):
        h, c = self.cell(x, state)
        return self.readout(h), (h, c)


# What the factory takes by keyword is offered: hidden, layers, lanes, device, dtype, data (the path
# that --data names) and vocab_size. Leave out what you do not need.
def make(hidden=64, lanes=8, device="cpu", dtype=torch.float32, data=None):
    if data is None:
        signal = np.sin(np.arange(4001 * lanes) / 7.0)
    else:
        signal = np.load(data)
    steps = len(signal) // lanes
    signal = torch.as_tensor(signal[: steps * lanes], dtype=dtype, device=device)
    signal = signal.reshape(lanes, steps, 1).movedim(0, 1)  # [T, B, F], time first

    module = Cell(hidden).to(device, dtype)
    zeros = torch.zeros(lanes, hidden, device=device, dtype=dtype)
    return Workload(
        module=module,
        loss_fn=nn.functional.mse_loss,  # a mean over the steps given, or (loss_sum, weight)
        inputs=signal[:-1],
        targets=signal[1:],  # what follows
        init_state=(zeros, zeros),
        optimizer=torch.optim.Adam(module.parameters(), lr=4e-3),
        # per_step=False,  # for a module that takes segments [T, B, F], such as one with an nn.LSTM
        # source=...,      # in place of inputs and targets: LaneSource, ArraySequence, your own
        # clip_grad_norm=1.0,
    )
'''
