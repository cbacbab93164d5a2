"""Visit 3: a training step of a framework that calls backward and the optimizer itself."""

import torch
from torch import nn

from tbptt_ckpt import unroll

inputs, targets = torch.randn(200, 4, 8), torch.randn(200, 4, 16)
module = nn.LSTM(8, 16)
optimizer = torch.optim.Adam(module.parameters(), lr=0.01)


def training_step(x, y):
    outputs, _ = unroll(module, x, strategy="sqrt")
    return nn.functional.mse_loss(outputs, y)


for _ in range(2):
    optimizer.zero_grad()
    loss = training_step(inputs, targets)
    loss.backward()
    optimizer.step()
    print(loss.item())
