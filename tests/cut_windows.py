"""A window that is cut somewhere, as a plain loop."""

from __future__ import annotations

from typing import Any

import cases
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def cut_at(
    module: nn.Module, num_steps: int, step: int, new_start: int, stop: int
) -> tuple[Tensor, Tensor]:
    """The weights' gradient of a window that is cut at `step`, and that of the state there."""
    inputs, targets = cases.random_data(num_steps)
    state: Any = None
    with torch.no_grad():
        for t in range(step):
            state = module(inputs[t], state)[1]
    states = [] if state is None else list(state) if isinstance(state, tuple) else [state]
    states = [each.requires_grad_() for each in states]
    state = None if state is None else tuple(states) if isinstance(state, tuple) else states[0]
    loss: Any = 0.0
    for t in range(step, stop):
        y, state = module(inputs[t], state)
        loss = loss + F.mse_loss(y, targets[t]) / (stop - new_start) * (t >= new_start)
    weights = list(module.parameters())
    found = torch.autograd.grad(loss, [*weights, *states], allow_unused=True)
    flat = [g.reshape(-1) for g in found if g is not None]
    count = sum(g is not None for g in found[: len(weights)])
    nothing = torch.zeros(1, dtype=torch.float64)
    return torch.cat(flat[:count]), torch.cat([nothing, *flat[count:]])
