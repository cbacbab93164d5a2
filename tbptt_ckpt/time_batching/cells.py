"""Recurrent cells with one autograd node per call.

NOTE [In place]
A call's gates live in one slot: first the sum of its products, then, in place, their
activations, which the backward needs, and in the backward their gradients, which the tap
needs. While the graph is kept for another backward the gradients go into a copy.

Letters: N lanes, K inputs, H width; G gates (LSTM 4, GRU 3, RNN 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tbptt_ckpt.time_batching.products import (
    add_sum,
    add_weight_gradient,
    multiply_back,
    write_product,
)
from tbptt_ckpt.time_batching.slots import cut, joined
from tbptt_ckpt.time_batching.taps import (
    Gradients,
    Notes,
    Versions,
    begin_backward,
    graph_is_kept,
)


class CellWeights(NamedTuple):
    """Weights of a cell, in PyTorch's layout: [G*H, K], [G*H, H], [G*H] or None."""

    input: Tensor
    hidden: Tensor
    input_bias: Tensor | None
    hidden_bias: Tensor | None


class Note(NamedTuple):
    """What one call leaves to the tap, in one backward."""

    slot: Tensor
    reset_slot: Tensor | None
    x: Tensor | None
    h: Tensor


class CellRecord:
    """The calls of one cell in a leaf that take their inputs from the same place.

    Args:
        weights: The cell's.
        buffer: [n, N, G*H]; with the products of the input, if the calls are those of rows.
        input_bias: [G*H], what is added to the products of the input.
        reset_buffer: [n, N, H] for the part of a GRU that its reset gate multiplies.
        of_rows: Whether call i is that of the i-th row, so that the tap makes the gradients of
            the inputs, too.
    """

    def __init__(
        self,
        weights: CellWeights,
        buffer: Tensor,
        input_bias: Tensor | None,
        reset_buffer: Tensor | None,
        of_rows: bool,
    ) -> None:
        self.input, self._learns_input = weights.input.detach(), weights.input.requires_grad
        self.of_rows = of_rows
        self.hidden = weights.hidden.detach()
        self.versions = Versions(*weights)
        self.slots = cut(buffer)
        self.reset_slots = None if reset_buffer is None else cut(reset_buffer)
        self.hidden_bias = None if weights.hidden_bias is None else weights.hidden_bias.detach()
        self.input_bias = input_bias
        self.notes: Notes[Note] = Notes()

    def close(self) -> None:
        """No call is to come: what the backward needs is saved by autograd from here on."""
        self.slots, self.reset_slots = [], None

    def filled_slot(self, call: int, x: Tensor) -> Tensor:
        """A call's slot with the products of its input: x: [N, K]."""
        slot = self.slots[call]
        if not self.of_rows:
            write_product(slot, x, self.input, self.input_bias)
        return slot

    def kept(self, x: Tensor) -> Tensor | None:
        """The input if the backward needs it: that of a frozen weight may be written to."""
        return x if self._learns_input else None

    def collect(self, needs: Sequence[bool], totals: Sequence[Tensor | None]) -> Gradients:
        """The gradients of the weights and of the rows."""
        calls, notes = self.notes.take()
        if not calls:
            return (None,) * len(needs)
        grad = joined([n.slot for n in notes])
        reset_grads = [n.reset_slot for n in notes if n.reset_slot is not None]
        reset_grad = joined(reset_grads) if reset_grads else None
        x = joined([n.x for n in notes if n.x is not None]) if needs[0] else None
        h = torch.cat([n.h for n in notes]) if needs[1] else None
        notes.clear()
        rows: list[Tensor | None] = [None] * len(needs[4:])
        if any(needs[4:]):
            row_grads = multiply_back(grad, self.input).chunk(len(calls))
            for call, row_grad in zip(calls, row_grads, strict=True):
                rows[call] = row_grad
        input_grad = None if x is None else add_weight_gradient(totals[0], grad, x)
        hidden_grad = None if h is None else _hidden_gradient(totals[1], grad, reset_grad, h)
        input_bias = add_sum(totals[2], grad) if needs[2] else None
        if not needs[3]:
            return input_grad, hidden_grad, input_bias, None, *rows
        if reset_grad is not None:
            grad = torch.cat([grad[:, : -reset_grad.shape[1]], reset_grad], 1)
        return input_grad, hidden_grad, input_bias, add_sum(totals[3], grad), *rows


def _hidden_gradient(
    total: Tensor | None, grad: Tensor, reset_grad: Tensor | None, h: Tensor
) -> Tensor | None:
    """The gradient of the hidden weight, added to a total if there is one."""
    if reset_grad is None:
        return add_weight_gradient(total, grad, h)
    width = reset_grad.shape[1]
    given_back = None
    if total is None:
        total = given_back = grad.new_zeros(grad.shape[1], width)
    add_weight_gradient(total[:-width], grad[:, :-width], h)
    add_weight_gradient(total[-width:], reset_grad, h)
    return given_back


def begin_cell_backward(ctx: Any) -> CellRecord:
    """What a backward begins with; its record."""
    begin_backward()
    record: CellRecord = ctx.record
    record.versions.check()
    return record


def own_slot(slot: Tensor | None) -> Any:
    """The slot to write gradients into."""
    return slot.clone() if slot is not None and graph_is_kept() else slot


def finish_cell_backward(
    ctx: Any, slot: Tensor, reset_slot: Tensor | None, x: Tensor | None, h: Tensor
) -> Tensor | None:
    """Leave the call's part to the tap; the gradient of its input."""
    record: CellRecord = ctx.record
    record.notes.leave(ctx.call, Note(slot, reset_slot, x, h))
    is_wanted = ctx.needs_input_grad[3] and not record.of_rows
    return multiply_back(slot, record.input) if is_wanted else None
