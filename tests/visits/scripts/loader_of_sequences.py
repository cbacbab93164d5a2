"""Visit 2: somebody with a DataLoader of [batch, time, features], as ignite's users have."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tbptt_ckpt import TBPTT, Batches, Trainer

dataset = TensorDataset(torch.randn(6, 60, 8), torch.randn(6, 60, 16))
loader = DataLoader(dataset, batch_size=2)
module = nn.LSTM(8, 16, batch_first=True)
optimizer = torch.optim.Adam(module.parameters(), lr=0.01)

tbptt = TBPTT(module, nn.MSELoss(), k1=20, k2=40, optimizer=optimizer)
result = Trainer(tbptt, Batches(loader, time_dim=1), epochs=2).train()
print(result)
