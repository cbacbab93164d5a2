"""`nn.GRUCell`. Gates in PyTorch's order: r, z, n."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tbptt_ckpt.time_batching.cells import CallGradients, Cell, CellWeights, Run, own
from tbptt_ckpt.time_batching.lstm import sigmoid_backward, tanh_backward
from tbptt_ckpt.time_batching.products import multiply, multiply_back


class GRU(Cell):
    """State h; the gates end up in the slot: [N, 3H].

    The reset gate multiplies a part of h's product, [N, H], with its bias: that part has a buffer
    of its own, which ends up with its gradients.
    """

    name = "GRUCell"
    resets = True

    def run(self, slot: Tensor, states: Sequence[Tensor], weights: CellWeights) -> Run:
        """The new h; the backward needs the part that the reset gate multiplies."""
        (h,) = states
        width = h.shape[1]
        product = multiply(h, weights.hidden, weights.hidden_bias)
        first, reset = slot[:, : 2 * width], product[:, 2 * width :]
        first.add_(product[:, : 2 * width]).sigmoid_()
        r, z, n = slot.chunk(3, 1)
        n.addcmul_(r, reset).tanh_()
        new_h = torch.sub(h, n)
        new_h.mul_(z).add_(n)
        return new_h, reset

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
        (h,) = states
        reset = own(kept)
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
        if not needs[0]:
            return reset, (None,)
        gates.copy_(first)
        products[:, 2 * width :] = reset
        return reset, (grad_h.add_(multiply_back(products, hidden)),)
