"""A recurrent layer inside a module, its data, and what differentiating it gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

T, B, F, H = 12, 3, 4, 5


class Inside(nn.Module):
    """A layer and a readout, called in several ways."""

    def __init__(self, layer: nn.RNNBase, call: str = "segment") -> None:
        super().__init__()
        self.layer, self.call = layer, call
        self.readout = nn.LazyLinear(H)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        axis = {"front": 0, "middle": 1}.get(self.call)
        y, state = self.layer(x if axis is None else x.unsqueeze(axis), state)
        y = self.readout(y)
        return (y if axis is None else y.squeeze(axis)), state


def inside(kind: Any = nn.LSTM, call: str = "segment", **options: Any) -> Inside:
    torch.manual_seed(0)
    module = Inside(kind(F, H, **options), call).double()
    module.readout(
        torch.zeros(1, module.layer.hidden_size * (1 + module.layer.bidirectional)).double()
    )
    return module


def data(lanes: int = B, steps: int = T, time_dim: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    shape = (steps, lanes) if time_dim == 0 else (lanes, steps)
    return torch.randn(*shape, F).double(), torch.randn(*shape, H).double()


def plain_gradient(module: nn.Module, layer: nn.RNNBase, x: Tensor, y: Tensor) -> list[Tensor]:
    """One call over the whole sequence, time first: the definition."""
    module.zero_grad()
    out, _ = (module if isinstance(module, Inside) else layer)(x, None)
    mse_loss(out, y).backward()
    found = [p.grad for p in module.parameters()]
    module.zero_grad()
    return found
