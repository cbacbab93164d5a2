"""The kinds of cells: `nn.LSTMCell`, `nn.GRUCell` and `nn.RNNCell`. Gates in PyTorch's order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tbptt_ckpt.time_batching.cells import Call, CallGradients, Cell, CellWeights, Run
from tbptt_ckpt.time_batching.products import add_product, multiply, multiply_back

_sigmoid_backward: Callable[..., Tensor] = torch.ops.aten.sigmoid_backward.grad_input
_tanh_backward: Callable[..., Tensor] = torch.ops.aten.tanh_backward.grad_input


class LSTM(Cell):
    """States h and c; the gates i, f, g, o end up in the slot: [N, 4H]."""

    name = "LSTMCell"
    num_states = 2

    def run(self, slot: Tensor, states: Sequence[Tensor], weights: CellWeights) -> Run:
        """The new h and c. The backward makes c again: a module may write into it."""
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
        return (new_h, new_c), None

    def gradients(self, grads: Sequence[Any], call: Call) -> CallGradients:
        """Those of h and c."""
        grad_h, grad_c = grads
        slot, (_, c), _, hidden, needs = call
        width = c.shape[1]
        i, f, g, o = slot.chunk(4, 1)
        if grad_h is None:
            grad_o, total = torch.zeros_like(c), grad_c
        else:
            grad_o = torch.mul(f, c).addcmul_(i, g).tanh_()
            total = torch.mul(grad_h, o)
            _tanh_backward(total, grad_o, grad_input=total)
            if grad_c is not None:
                total.add_(grad_c)
            grad_o.mul_(grad_h)
        first = slot[:, : 2 * width]
        grad_first = torch.empty_like(first)
        torch.mul(total, g, out=grad_first[:, :width])
        torch.mul(total, c, out=grad_first[:, width:])
        grad_g = torch.mul(total, i)
        grad_c = torch.mul(total, f) if needs[1] else None
        _sigmoid_backward(grad_first, first, grad_input=first)
        _tanh_backward(grad_g, g, grad_input=g)
        _sigmoid_backward(grad_o, o, grad_input=o)
        return None, (multiply_back(slot, hidden) if needs[0] else None, grad_c)


class GRU(Cell):
    """State h; the gates r, z, n end up in the slot: [N, 3H].

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

    def gradients(self, grads: Sequence[Any], call: Call) -> CallGradients:
        """That of h."""
        (grad,) = grads
        slot, (h,), reset, hidden, needs = call
        width = h.shape[1]
        r, z, n = slot.chunk(3, 1)
        grad_h = torch.mul(grad, z)
        first = slot[:, : 2 * width]
        products = torch.empty_like(slot)  # gradients of the products of h
        gates = products[:, : 2 * width]
        difference = torch.sub(h, n)
        torch.mul(difference, grad, out=products[:, width : 2 * width])
        torch.sub(grad, grad_h, out=difference)
        _tanh_backward(difference, n, grad_input=n)
        torch.mul(n, reset, out=products[:, :width])
        torch.mul(n, r, out=reset)
        _sigmoid_backward(gates, first, grad_input=first)
        if not needs[0]:
            return reset, (None,)
        gates.copy_(first)
        products[:, 2 * width :] = reset
        return reset, (grad_h.add_(multiply_back(products, hidden)),)


class RNN(Cell):
    """State h; the slot, [N, H], only holds the preactivation, and in the backward its gradient."""

    def __init__(self, nonlinearity: str) -> None:
        self.name, self._is_tanh = f"RNNCell {nonlinearity}", nonlinearity == "tanh"

    def run(self, slot: Tensor, states: Sequence[Tensor], weights: CellWeights) -> Run:
        """The new h, which the backward needs."""
        add_product(slot, states[0], weights.hidden)
        new_h = torch.tanh(slot) if self._is_tanh else torch.relu(slot)
        return new_h, new_h

    def gradients(self, grads: Sequence[Any], call: Call) -> CallGradients:
        """That of h."""
        (grad,) = grads
        slot, _, new_h, hidden, needs = call
        if self._is_tanh:
            _tanh_backward(grad, new_h, grad_input=slot)
        else:
            torch.mul(grad, new_h > 0, out=slot)
        return None, (multiply_back(slot, hidden) if needs[0] else None,)
