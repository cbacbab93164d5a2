"""A traced step that computes in less precision than it returns is compared with that rounding."""

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, TbpttWarning, TensorSequence


class Halved(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(16, 64)
        self.between, self.out = nn.Linear(64, 64).to(dtype), nn.Linear(64, 8)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        h, c = self.cell(x, state)
        return self.out(self.between(h.to(self.between.weight.dtype)).float()), (h, c)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_its_rounding_is_no_change(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module, inputs, targets = Halved(dtype), torch.randn(3000, 8, 16), torch.randn(3000, 8, 8)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    tbptt = TBPTT(module, F.mse_loss, 100, 100, optimizer, strategy="uniform:25")
    with warnings.catch_warnings():
        warnings.simplefilter("error", TbpttWarning)
        tbptt.train(TensorSequence(inputs, targets), (torch.zeros(8, 64),) * 2)
    assert [each.operation for each in tbptt.batched_operations] == ["LSTMCell of all steps"]
