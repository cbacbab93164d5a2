"""Visit 8: what strategies take, as a table, a picture and plain data."""

from pathlib import Path

import torch
from torch import nn

from tbptt_ckpt import profile_strategies

module = nn.LSTM(8, 16)
optimizer = torch.optim.Adam(module.parameters())
inputs, targets = torch.randn(32, 4, 8), torch.randn(32, 4, 16)

report = profile_strategies(
    module,
    nn.MSELoss(),
    inputs,
    targets,
    k1=16,
    k2=32,
    optimizer=optimizer,
    strategies=["sqrt"],
    repeats=1,
)
print(report)
Path("report.json").write_text(report.to_json())
report.plot().figure.savefig("report.png")
