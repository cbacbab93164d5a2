"""`nn.LSTMCell` as one autograd node per call. Gates in PyTorch's order: i, f, g, o."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tbptt_ckpt.time_batching.cells import (
    CellRecord,
    begin_cell_backward,
    finish_cell_backward,
    own_slot,
)
from tbptt_ckpt.time_batching.products import add_product, multiply_back

sigmoid_backward: Callable[..., Tensor] = torch.ops.aten.sigmoid_backward.grad_input
tanh_backward: Callable[..., Tensor] = torch.ops.aten.tanh_backward.grad_input


def lstm_step(slot: Tensor, h: Tensor, c: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """One step; the gates end up in the slot.

    Args:
        slot: [N, 4H], the products of the input and the biases.
        h: [N, H].
        c: [N, H].
        hidden: [4H, H], the weight of h.
    """
    width = c.shape[1]
    add_product(slot, h, hidden)
    i, f, g, o = slot.chunk(4, 1)
    slot[:, : 2 * width].sigmoid_()
    g.tanh_()
    o.sigmoid_()
    new_c = torch.mul(f, c)
    new_c.addcmul_(i, g)
    new_h = torch.tanh(new_c)
    new_h.mul_(o)
    return new_h, new_c


class LSTMNode(torch.autograd.Function):
    """One call, with its gates in a slot of the record."""

    @staticmethod
    def forward(
        ctx: Any,
        record: CellRecord,
        call: int,
        _token: Tensor,
        x: Tensor,
        h: Tensor,
        c: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The new h and c."""
        ctx.set_materialize_grads(False)
        ctx.record, ctx.call = record, call
        slot = record.filled_slot(call, x)
        new_h, new_c = lstm_step(slot, h, c, record.hidden)
        ctx.save_for_backward(slot, record.kept(x), h, c, new_c)
        return new_h, new_c

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Gradients of x, h and c; those of the gates stay in the slot for the tap."""
        grad_h, grad_c = grads
        if grad_h is None and grad_c is None:
            return (None,) * 6
        record = begin_cell_backward(ctx)
        slot, x, h, c, new_c = ctx.saved_tensors
        slot = own_slot(slot)
        width = c.shape[1]
        i, f, g, o = slot.chunk(4, 1)
        if grad_h is None:
            grad_o, total = torch.zeros_like(c), grad_c
        else:
            grad_o = torch.tanh(new_c)
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
        grad_c = torch.mul(total, f) if ctx.needs_input_grad[5] else None
        sigmoid_backward(grad_first, first, grad_input=first)
        tanh_backward(grad_g, g, grad_input=g)
        sigmoid_backward(grad_o, o, grad_input=o)
        grad_x = finish_cell_backward(ctx, slot, None, x, h)
        grad_h = multiply_back(slot, record.hidden) if ctx.needs_input_grad[4] else None
        return None, None, None, grad_x, grad_h, grad_c
