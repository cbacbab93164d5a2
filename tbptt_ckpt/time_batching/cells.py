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

    def collect(
        self, whole: Tensor | None, needs: Sequence[bool], totals: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, ...]:
        """The gradients of the inputs of all steps and of the weights."""
        task = torch._C._current_graph_task_id()
        notes = sorted((n for n in self._notes if n.task == task), key=lambda n: n.call)
        self._notes = []
        if not notes:
            return (None,) * 5
        calls = [n.call for n in notes]
        grad = joined([n.slot for n in notes])
        reset_grads = [n.reset_slot for n in notes if n.reset_slot is not None]
        reset_grad = joined(reset_grads) if reset_grads else None
        x = _inputs_of(notes, whole) if needs[1] else None
        h = torch.cat([n.h for n in notes]) if needs[2] else None
        notes.clear()
        whole_grad = None
        if whole is not None and needs[0]:
            whole_grad = _spread(multiply_back(grad, self.input), calls, whole)
        input_grad = None if x is None else add_weight_gradient(totals[0], grad, x)
        hidden_grad = None if h is None else _hidden_gradient(totals[1], grad, reset_grad, h)
        input_bias = add_sum(totals[2], grad) if needs[3] else None
        if not needs[4]:
            return whole_grad, input_grad, hidden_grad, input_bias, None
        if reset_grad is not None:
            grad = torch.cat([grad[:, : -reset_grad.shape[1]], reset_grad], 1)
        return whole_grad, input_grad, hidden_grad, input_bias, add_sum(totals[3], grad)


def _inputs_of(notes: Sequence[Note], whole: Tensor | None) -> Tensor:
    """The inputs of calls as one matrix."""
    if whole is None:
        return torch.cat([n.x for n in notes if n.x is not None])
    x = whole if len(notes) == len(whole) else whole[[n.call for n in notes]]
    return x.reshape(-1, x.shape[-1])


def _spread(grad: Tensor, calls: list[int], whole: Tensor) -> Tensor:
    """Gradients of the rows that were used, among those of all rows."""
    if len(calls) == len(whole):
        return grad.view(whole.shape)
    spread = torch.zeros_like(whole)
    spread[calls] = grad.view(len(calls), *whole.shape[1:])
    return spread


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
