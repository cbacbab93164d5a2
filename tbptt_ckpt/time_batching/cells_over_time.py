"""The kinds of cells over all steps of a run.

NOTE [Factors first]
What the gates of a step do to the gradient that comes from later steps is known before that
gradient is. The factors are made of many steps at once, where the gates were; what is left to be
done step by step, backwards, is to multiply by them, and one product with the recurrent weight.
What the factors become so are the gradients of the gates' sums, of which the weights' are made.
Of so many steps only that what this takes beside them stays small, and in the processor's cache.

Letters: L steps, N lanes, K inputs, H width; G gates (LSTM 4, GRU 3, RNN 1).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from tbptt_ckpt.time_batching.cells import CellWeights
from tbptt_ckpt.time_batching.products import add_product, multiply, multiply_back

Grads = list[Tensor]
_PIECE_STEPS, _PIECE_ELEMENTS = 16, 1 << 18  # of the gates whose factors are made at once, at most
# What a window's leaf saves of a cell: gates, [L, N, G*H], states, [L+1, N, H] each, and for the
# GRU what its reset gate multiplies, [L, N, H].
Saved = tuple[Tensor, Sequence[Tensor], Tensor | None]


class CellOverTime(ABC):
    """A kind of cell, over many steps. Gates in PyTorch's order."""

    num_states = 1
    resets = False  # whether a gate multiplies a part of h's product
    has_kernel = False  # which takes less time than a loop on a CPU

    @abstractmethod
    def run(self, saved: Saved, weights: CellWeights) -> None:
        """All steps: gates come with the products of the inputs, and end up activated.

        States come with the first of each; the others are written.
        """

    def walk_back(
        self, saved: Saved, hidden: Tensor, outputs: Sequence[Tensor], grads: Grads
    ) -> Grads:
        """Make the gradients of the gates' sums, in their place, and those of the first states.

        From those of each step's output, [N, H], and of the last states, which may be written to.
        """
        gates, states, reset = saved
        stop, fitting = len(gates), _PIECE_ELEMENTS // max(1, gates[0].numel())
        most = max(1, min(_PIECE_STEPS, fitting))
        while stop:
            start = max(0, stop - most)
            part = None if reset is None else reset[start:stop]
            piece = gates[start:stop], [each[start : stop + 1] for each in states], part
            grads = self._walk_piece_back(piece, hidden, outputs[start:stop], grads)
            stop = start
        return grads

    @abstractmethod
    def _walk_piece_back(
        self, saved: Saved, hidden: Tensor, outputs: Sequence[Tensor], grads: Grads
    ) -> Grads:
        """The same for a piece."""


class LSTMOverTime(CellOverTime):
    """Gates i, f, g, o; states h and c."""

    num_states, has_kernel = 2, True

    def run(self, saved: Saved, weights: CellWeights) -> None:
        """All steps."""
        gates, (hs, cs), _ = saved
        width = hs.shape[2]
        i, f, g, o = _cut(gates, width)
        sums, first = gates.unbind(0), gates[..., : 2 * width].unbind(0)
        h, c = hs.unbind(0), cs.unbind(0)
        for t in range(len(gates)):
            add_product(sums[t], h[t], weights.hidden)
            first[t].sigmoid_()
            g[t].tanh_()
            o[t].sigmoid_()
            torch.mul(f[t], c[t], out=c[t + 1]).addcmul_(i[t], g[t])
            torch.tanh(c[t + 1], out=h[t + 1]).mul_(o[t])

    def _walk_piece_back(
        self, saved: Saved, hidden: Tensor, outputs: Sequence[Tensor], grads: Grads
    ) -> Grads:
        """From gradients of h and c to theirs at the start."""
        gates, (hs, cs), _ = saved
        width = hs.shape[2]
        forget = gates[..., width : 2 * width].contiguous().unbind(0)
        to_c = self._factors(gates, cs).unbind(0)
        of_c = gates.view(*gates.shape[:2], 4, width)[:, :, :3].unbind(0)
        of_h, sums = gates[..., 3 * width :].unbind(0), gates.unbind(0)
        grad_h, grad_c = grads
        for t in reversed(range(len(gates))):
            grad_h.add_(outputs[t])
            grad_c.addcmul_(grad_h, to_c[t])
            of_c[t].mul_(grad_c[:, None])
            of_h[t].mul_(grad_h)
            grad_c.mul_(forget[t])
            grad_h = multiply_back(sums[t], hidden)
        return [grad_h, grad_c]

    def _factors(self, gates: Tensor, cs: Tensor) -> Tensor:
        """From the gradient of c to those of i, f, g, and of h to that of o; from h to c."""
        i, f, g, o = gates.chunk(4, 2)
        tanh = torch.tanh(cs[1:])
        to_c = torch.addcmul(o, tanh.square(), o, value=-1)
        o.copy_(_sigmoid_factor(tanh.mul_(o), o))
        f.copy_(_sigmoid_factor(torch.mul(cs[:-1], f, out=tanh), f))
        of_i = _sigmoid_factor(torch.mul(i, g, out=tanh), i)
        g.copy_(torch.addcmul(i, tanh, g, value=-1))
        i.copy_(of_i)
        return to_c


class GRUOverTime(CellOverTime):
    """Gates r, z, n; state h, of whose product r multiplies the part of n."""

    resets = True

    def run(self, saved: Saved, weights: CellWeights) -> None:
        """All steps."""
        gates, (hs,), reset = saved
        assert reset is not None, "a GRU has a reset gate"
        width = hs.shape[2]
        r, z, n = _cut(gates, width)
        first, h, part = gates[..., : 2 * width].unbind(0), hs.unbind(0), reset.unbind(0)
        for t in range(len(gates)):
            product = multiply(h[t], weights.hidden, weights.hidden_bias)
            first[t].add_(product[:, : 2 * width]).sigmoid_()
            part[t].copy_(product[:, 2 * width :])
            n[t].addcmul_(r[t], part[t]).tanh_()
            torch.sub(h[t], n[t], out=h[t + 1]).mul_(z[t]).add_(n[t])

    def _walk_piece_back(
        self, saved: Saved, hidden: Tensor, outputs: Sequence[Tensor], grads: Grads
    ) -> Grads:
        """From gradients of h to that at the start; those of the reset gate's part in its place."""
        gates, (hs,), reset = saved
        assert reset is not None, "a GRU has a reset gate"
        width = hs.shape[2]
        keep = gates[..., width : 2 * width].contiguous().unbind(0)
        self._factors(gates, hs[:-1], reset)
        of_h = gates.view(*gates.shape[:2], 3, width).unbind(0)
        first, part = gates[..., : 2 * width].unbind(0), reset.unbind(0)
        sums = gates.new_empty(gates.shape[1:])
        (grad,) = grads
        for t in reversed(range(len(gates))):
            grad.add_(outputs[t])
            of_h[t].mul_(grad[:, None])
            sums[:, : 2 * width] = first[t]
            torch.mul(part[t], grad, out=sums[:, 2 * width :])
            part[t].copy_(sums[:, 2 * width :])
            grad = multiply_back(sums, hidden).addcmul_(grad, keep[t])
        return [grad]

    def _factors(self, gates: Tensor, hs: Tensor, reset: Tensor) -> None:
        """From the gradient of h to those of r, z, n, and of what r multiplies."""
        r, z, n = gates.chunk(3, 2)
        of_n = torch.addcmul(1 - z, n.square(), 1 - z, value=-1)
        z.copy_(_sigmoid_factor(torch.sub(hs, n).mul_(z), z))
        of_r = _sigmoid_factor(reset.mul_(of_n).mul_(r), r)
        torch.mul(of_n, r, out=reset)
        r.copy_(of_r)
        n.copy_(of_n)


class RNNOverTime(CellOverTime):
    """One sum, whose tanh or positive part is the state h."""

    def __init__(self, nonlinearity: str) -> None:
        self._is_tanh = nonlinearity == "tanh"

    def run(self, saved: Saved, weights: CellWeights) -> None:
        """All steps."""
        gates, (hs,), _ = saved
        sums, h = gates.unbind(0), hs.unbind(0)
        for t in range(len(gates)):
            add_product(sums[t], h[t], weights.hidden)
            if self._is_tanh:
                torch.tanh(sums[t], out=h[t + 1])
            else:
                torch.clamp(sums[t], min=0, out=h[t + 1])

    def _walk_piece_back(
        self, saved: Saved, hidden: Tensor, outputs: Sequence[Tensor], grads: Grads
    ) -> Grads:
        """From gradients of h to that at the start."""
        gates, (hs,), _ = saved
        if self._is_tanh:
            torch.mul(hs[1:], hs[1:], out=gates).neg_().add_(1)
        else:
            torch.gt(hs[1:], 0, out=gates)
        sums, (grad,) = gates.unbind(0), grads
        for t in reversed(range(len(gates))):
            grad = multiply_back(sums[t].mul_(grad.add_(outputs[t])), hidden)
        return [grad]


def _cut(gates: Tensor, width: int) -> list[Sequence[Tensor]]:
    """Each gate's part, step by step."""
    return [part.unbind(0) for part in gates.chunk(gates.shape[2] // width, 2)]


def _sigmoid_factor(value: Tensor, gate: Tensor) -> Tensor:
    """`value * (1 - gate)`, where the value has the gate in it."""
    return torch.addcmul(value, value, gate, value=-1)
