"""`nn.GRUCell` as one autograd node per call. Gates in PyTorch's order: r, z, n."""

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
from tbptt_ckpt.time_batching.lstm import sigmoid_backward, tanh_backward
from tbptt_ckpt.time_batching.products import multiply, multiply_back


def gru_step(slot: Tensor, h: Tensor, hidden: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """One step; the gates end up in the slot.

    Args:
        slot: [N, 3H], the products of the input and its bias.
        h: [N, H].
        hidden: [3H, H], the weight of h.
        bias: [3H] of h.

    Returns:
        The new h, and [N, H], the part of h's product that the reset gate multiplies.
    """
    width = h.shape[1]
    product = multiply(h, hidden, bias)
    first, reset = slot[:, : 2 * width], product[:, 2 * width :]
    first.add_(product[:, : 2 * width]).sigmoid_()
    r, z, n = slot.chunk(3, 1)
    n.addcmul_(r, reset).tanh_()
    new_h = torch.sub(h, n)
    new_h.mul_(z).add_(n)
    return new_h, reset


class GRUNode(torch.autograd.Function):
    """One call, with its gates in a slot of the record."""

    @staticmethod
    def forward(
        ctx: Any, record: CellRecord, call: int, _token: Tensor, x: Tensor, h: Tensor
    ) -> Tensor:
        """The new h."""
        ctx.set_materialize_grads(False)
        ctx.record, ctx.call = record, call
        assert record.reset_slots is not None, "made for a GRU"
        slot = record.filled_slot(call, x)
        new_h, product = gru_step(slot, h, record.hidden, record.hidden_bias)
        reset = record.reset_slots[call]
        reset.copy_(product)
        ctx.save_for_backward(slot, reset, record.kept(x), h)
        return new_h

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Gradients of x and h; those of the gates stay in the slots for the tap."""
        (grad,) = grads
        if grad is None:
            return (None,) * 5
        record = begin_cell_backward(ctx)
        slot, reset, x, h = ctx.saved_tensors
        slot, reset = own_slot(slot), own_slot(reset)
        width = h.shape[1]
        r, z, n = slot.chunk(3, 1)
        grad_h = torch.mul(grad, z)
        first = slot[:, : 2 * width]
        products = torch.empty_like(slot)  # gradients of the products of h
        gates = products[:, : 2 * width]
        difference = torch.sub(h, n)
        torch.mul(difference, grad, out=products[:, width : 2 * width])
        torch.sub(grad, grad_h, out=difference)
        tanh_backward(difference, n, grad_input=n)
        torch.mul(n, reset, out=products[:, :width])
        torch.mul(n, r, out=reset)
        sigmoid_backward(gates, first, grad_input=first)
        grad_x = finish_cell_backward(ctx, slot, reset, x, h)
        if not ctx.needs_input_grad[4]:
            return None, None, None, grad_x, None
        gates.copy_(first)
        products[:, 2 * width :] = reset
        grad_h.add_(multiply_back(products, record.hidden))
        return None, None, None, grad_x, grad_h
