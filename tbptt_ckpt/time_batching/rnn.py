"""`nn.RNNCell`, with either of its nonlinearities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tbptt_ckpt.time_batching.cells import CallGradients, Cell, CellWeights, Run
from tbptt_ckpt.time_batching.lstm import tanh_backward
from tbptt_ckpt.time_batching.products import add_product, multiply_back


class RNN(Cell):
    """State h; the slot, [N, H], only holds the preactivation, and in the backward its gradient.

    Args:
        nonlinearity: "tanh" or "relu".
    """

    def __init__(self, nonlinearity: str) -> None:
        self.name, self._is_tanh = f"RNNCell {nonlinearity}", nonlinearity == "tanh"

    def run(self, slot: Tensor, states: Sequence[Tensor], weights: CellWeights) -> Run:
        """The new h, which the backward needs."""
        add_product(slot, states[0], weights.hidden)
        new_h = torch.tanh(slot) if self._is_tanh else torch.relu(slot)
        return new_h, new_h

    def gradients(
        self,
        grads: Sequence[Any],
        slot: Tensor,
        states: Sequence[Tensor],
        kept: Tensor,
        hidden: Tensor,
        needs: Sequence[bool],
    ) -> CallGradients:
        """That of h."""
        (grad,) = grads
        if self._is_tanh:
            tanh_backward(grad, kept, grad_input=slot)
        else:
            torch.mul(grad, kept > 0, out=slot)
        return None, (multiply_back(slot, hidden) if needs[0] else None,)
