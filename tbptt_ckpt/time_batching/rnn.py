"""`nn.RNNCell` as one autograd node per call, with either of its nonlinearities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tbptt_ckpt.time_batching.cells import (
    CellRecord,
    begin_cell_backward,
    finish_cell_backward,
    own_slot,
)
from tbptt_ckpt.time_batching.lstm import tanh_backward
from tbptt_ckpt.time_batching.products import add_product, multiply_back


def rnn_step(slot: Tensor, h: Tensor, hidden: Tensor, is_tanh: bool) -> Tensor:
    """One step.

    Args:
        slot: [N, H], the products of the input and the biases.
        h: [N, H].
        hidden: [H, H], the weight of h.
        is_tanh: Whether the nonlinearity is tanh and not relu.
    """
    add_product(slot, h, hidden)
    return torch.tanh(slot) if is_tanh else torch.relu(slot)


class RNNNode(torch.autograd.Function):
    """One call; its slot only holds the gradient of the preactivation, in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        record: CellRecord,
        call: int,
        _token: Tensor,
        x: Tensor,
        h: Tensor,
        is_tanh: bool,
    ) -> Tensor:
        """The new h."""
        ctx.set_materialize_grads(False)
        ctx.record, ctx.call, ctx.is_tanh = record, call, is_tanh
        slot = record.filled_slot(call, x)
        new_h = rnn_step(slot, h, record.hidden, is_tanh)
        ctx.save_for_backward(slot, record.kept(x), h, new_h)
        return new_h

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Gradients of x and h."""
        (grad,) = grads
        if grad is None:
            return (None,) * 6
        record = begin_cell_backward(ctx)
        slot, x, h, new_h = ctx.saved_tensors
        slot = own_slot(slot)
        if ctx.is_tanh:
            tanh_backward(grad, new_h, grad_input=slot)
        else:
            torch.mul(grad, new_h > 0, out=slot)
        grad_x = finish_cell_backward(ctx, slot, None, x, h)
        grad_h = multiply_back(slot, record.hidden) if ctx.needs_input_grad[4] else None
        return None, None, None, grad_x, grad_h, None
