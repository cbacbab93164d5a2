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
    multiply_back,
    weight_gradient,
    write_product,
)
from tbptt_ckpt.time_batching.slots import cut, joined
from tbptt_ckpt.time_batching.taps import Versions, begin_backward, graph_is_kept


class CellWeights(NamedTuple):
    """Weights of a cell, in PyTorch's layout: [G*H, K], [G*H, H], [G*H] or None."""

    input: Tensor
    hidden: Tensor
    input_bias: Tensor | None
    hidden_bias: Tensor | None


class Note(NamedTuple):
    """What one call leaves to the tap, in one backward."""

    call: int
    task: int
    slot: Tensor
    reset_slot: Tensor | None
    x: Tensor | None
    h: Tensor


class CellRecord:
    """The calls of one cell in a leaf that take their inputs from the same place.

    Args:
        weights: The cell's.
        buffer: [n, N, G*H]; with the products of the input, unless each call brings its input.
        input_bias: [G*H], what is added to the products of the input.
        reset_buffer: [n, N, H] for the part of a GRU that its reset gate multiplies.
    """

    def __init__(
        self,
        weights: CellWeights,
        buffer: Tensor,
        input_bias: Tensor | None,
        reset_buffer: Tensor | None = None,
    ) -> None:
        self.input = weights.input.detach()
        self.hidden = weights.hidden.detach()
        self.versions = Versions(*weights)
        self.slots = cut(buffer)
        self.reset_slots = None if reset_buffer is None else cut(reset_buffer)
        self.hidden_bias = None if weights.hidden_bias is None else weights.hidden_bias.detach()
        self.input_bias = input_bias
        self.used = [False] * len(self.slots)
        self._notes: list[Note] = []

    def close(self) -> None:
        """No call is to come: what the backward needs is saved by autograd from here on."""
        self.slots, self.reset_slots = [], None

    def filled_slot(self, call: int, x: Tensor | None) -> Tensor:
        """A call's slot with the products of its input: x: [N, K], or None if they are there."""
        slot = self.slots[call]
        if x is not None:
            write_product(slot, x, self.input, self.input_bias)
        return slot

    def note(self, note: Note) -> None:
        """Leave one call's part to the tap."""
        self._notes.append(note)

    def collect(self, whole: Tensor | None, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
        """The gradients of the inputs of all steps and of the weights."""
        task = torch._C._current_graph_task_id()
        notes = sorted((n for n in self._notes if n.task == task), key=lambda n: n.call)
        self._notes = []
        if not notes:
            return (None,) * 5
        grad = joined([n.slot for n in notes])
        whole_grad = None
        if whole is None:
            x = torch.cat([n.x for n in notes if n.x is not None]) if needs[1] else None
        else:
            calls = [n.call for n in notes]
            x = whole if len(calls) == len(whole) else whole[calls]
            x = x.reshape(-1, x.shape[-1])
            if needs[0]:
                whole_grad = _spread(multiply_back(grad, self.input), calls, whole)
        reset_grads = [n.reset_slot for n in notes if n.reset_slot is not None]
        h = torch.cat([n.h for n in notes]) if needs[2] else None
        notes.clear()
        input_grad = weight_gradient(grad, x) if needs[1] and x is not None else None
        hidden_grad, bias_grads = _hidden_gradients(grad, reset_grads, h, needs)
        return whole_grad, input_grad, hidden_grad, *bias_grads


def _spread(grad: Tensor, calls: list[int], whole: Tensor) -> Tensor:
    """Gradients of the rows that were used, among those of all rows."""
    if len(calls) == len(whole):
        return grad.view(whole.shape)
    spread = torch.zeros_like(whole)
    spread[calls] = grad.view(len(calls), *whole.shape[1:])
    return spread


def _hidden_gradients(
    grad: Tensor, reset_grads: list[Tensor], h: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor | None, tuple[Tensor | None, Tensor | None]]:
    """Gradients of the hidden weight and of both biases."""
    if not reset_grads:
        bias_grad = grad.sum(0) if needs[3] or needs[4] else None
        hidden = None if h is None else weight_gradient(grad, h)
        second = bias_grad.clone() if needs[3] and needs[4] and bias_grad is not None else bias_grad
        return hidden, (bias_grad if needs[3] else None, second if needs[4] else None)
    last = joined(reset_grads)
    width = last.shape[1]
    hidden = None
    if h is not None:
        hidden = torch.empty(grad.shape[1], width, dtype=grad.dtype, device=grad.device)
        hidden[:-width] = weight_gradient(grad[:, :-width], h)
        hidden[-width:] = weight_gradient(last, h)
    input_bias = grad.sum(0) if needs[3] else None
    hidden_bias = None
    if needs[4]:
        hidden_bias = torch.cat([grad[:, :-width].sum(0), last.sum(0)])
    return hidden, (input_bias, hidden_bias)


def begin_cell_backward(ctx: Any) -> tuple[int, CellRecord]:
    """What a backward begins with: the number of the backward, and the record."""
    task, record = begin_backward(), ctx.record
    record.versions.check()
    return task, record


def own_slot(slot: Tensor | None) -> Any:
    """The slot to write gradients into."""
    return slot.clone() if slot is not None and graph_is_kept() else slot


def finish_cell_backward(
    ctx: Any, task: int, slot: Tensor, reset_slot: Tensor | None, x: Tensor | None, h: Tensor
) -> Tensor | None:
    """Leave the call's part to the tap; the gradient of its input."""
    record: CellRecord = ctx.record
    record.note(Note(ctx.call, task, slot, reset_slot, x, h))
    return multiply_back(slot, record.input) if ctx.needs_input_grad[3] else None
