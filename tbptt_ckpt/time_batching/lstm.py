"""`nn.LSTMCell`. Gates in PyTorch's order: i, f, g, o."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tbptt_ckpt.time_batching.cells import CallGradients, Cell, CellWeights, Run
from tbptt_ckpt.time_batching.products import add_product, multiply_back

sigmoid_backward: Callable[..., Tensor] = torch.ops.aten.sigmoid_backward.grad_input
tanh_backward: Callable[..., Tensor] = torch.ops.aten.tanh_backward.grad_input


class LSTM(Cell):
    """States h and c; the gates end up in the slot: [N, 4H]."""

    name = "LSTMCell"
    num_states = 2

    def run(self, slot: Tensor, states: Sequence[Tensor], weights: CellWeights) -> Run:
        """The new h and c, of which the backward needs c."""
        h, c = states
        width = c.shape[1]
        add_product(slot, h, weights.hidden)
        i, f, g, o = slot.chunk(4, 1)
        slot[:, : 2 * width].sigmoid_()
        g.tanh_()
        o.sigmoid_()
        new_c = torch.mul(f, c)
        new_c.addcmul_(i, g)
        new_h = torch.tanh(new_c)
        new_h.mul_(o)
        return (new_h, new_c), new_c

    def gradients(
        self,
        grads: Sequence[Any],
        slot: Tensor,
        states: Sequence[Tensor],
        kept: Tensor,
        hidden: Tensor,
        needs: Sequence[bool],
    ) -> CallGradients:
        """Those of h and c."""
        grad_h, grad_c = grads
        _, c = states
        width = c.shape[1]
        i, f, g, o = slot.chunk(4, 1)
        if grad_h is None:
            grad_o, total = torch.zeros_like(c), grad_c
        else:
            grad_o = torch.tanh(kept)
            total = torch.mul(grad_h, o)
            tanh_backward(total, grad_o, grad_input=total)
            if grad_c is not None:
                total.add_(grad_c)
            grad_o.mul_(grad_h)
        first = slot[:, : 2 * width]
        grad_first = torch.empty_like(first)
        torch.mul(total, g, out=grad_first[:, :width])
        torch.mul(total, c, out=grad_first[:, width:])
        grad_g = torch.mul(total, i)
        grad_c = torch.mul(total, f) if needs[1] else None
        sigmoid_backward(grad_first, first, grad_input=first)
        tanh_backward(grad_g, g, grad_input=g)
        sigmoid_backward(grad_o, o, grad_input=o)
        return None, (multiply_back(slot, hidden) if needs[0] else None, grad_c)
