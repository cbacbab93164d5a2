"""Recurrent cells with one autograd node per call.

NOTE [In place]
A call's gates live in one slot: first the sum of its products, then, in place, their
activations, which the backward needs, and in the backward their gradients, which the tap
needs. While the graph is kept for another backward the gradients go into a copy.

Letters: N lanes, K inputs, H width; G gates (LSTM 4, GRU 3, RNN 1).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
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
from tbptt_ckpt.time_batching.rows import cut, joined
from tbptt_ckpt.time_batching.taps import Gradients, Record, Tensors, begin_backward, undisturbed


class CellWeights(NamedTuple):
    """Weights of a cell, in PyTorch's layout: [G*H, K], [G*H, H], [G*H] or None."""

    input: Tensor
    hidden: Tensor
    input_bias: Tensor | None
    hidden_bias: Tensor | None


# What the backward of a call knows: its slot, the states before, what `run` gave to keep, the
# weight of h, and which states want a gradient. No named tuple: one is made in every step.
Call = tuple[Tensor, Sequence[Tensor], Any, Tensor, Sequence[bool]]
Run = tuple[Tensor | tuple[Tensor, ...], Tensor | None]
CallGradients = tuple[Tensor | None, tuple[Tensor | None, ...]]


class Cell(ABC):
    """A kind of cell."""

    name: str  # for the report
    num_states = 1
    # Whether a gate multiplies a part of h's product, which is kept, and whose bias cannot be
    # added to the products of the input.
    resets = False

    @abstractmethod
    def run(self, slot: Tensor, states: Sequence[Tensor], weights: CellWeights) -> Run:
        """One step, and a tensor that its backward needs, if any.

        The slot, [N, G*H], comes with the products of the input and the biases, and ends up with
        the gates; states: [N, H] each.
        """

    @abstractmethod
    def gradients(self, grads: Sequence[Any], call: Call) -> CallGradients:
        """The gradients of what `run` gave to keep, if a weight made that, and of the states.

        Those of the gates are left in the slot.
        """


class Note(NamedTuple):
    """What one call leaves to the tap, in one backward."""

    slot: Tensor
    reset_slot: Tensor | None
    x: Tensor | None
    h: Tensor


class CellRecord(Record[Note]):
    """The calls of one cell in a leaf that take their inputs from the same place.

    If call i is that of the i-th row, the buffer, [n, N, G*H], has the products of the inputs, and
    the tap makes their gradients, too. The bias, [G*H], is what is added to these products.
    """

    def __init__(
        self,
        cell: Cell,
        weights: CellWeights,
        buffer: Tensor,
        input_bias: Tensor | None,
        of_rows: bool,
    ) -> None:
        super().__init__(*weights)
        self.cell, self.weights, self.of_rows, self.input_bias = cell, weights, of_rows, input_bias
        self.slots, self.reset_slots = cut(buffer), None
        if cell.resets:
            self.reset_slots = cut(buffer.new_empty(*buffer.shape[:2], weights.hidden.shape[1]))

    def close(self) -> None:
        """No call is to come: what the backward needs is saved by autograd from here on."""
        self.slots, self.reset_slots = [], None

    def collect(self, parts: dict[int, Note], needs: Sequence[bool], totals: Tensors) -> Gradients:
        """The gradients of the weights and of the rows."""
        calls, notes = list(parts), list(parts.values())
        parts.clear()
        grad = joined([n.slot for n in notes])
        reset_grads = [n.reset_slot for n in notes if n.reset_slot is not None]
        reset_grad = joined(reset_grads) if reset_grads else None
        join_inputs = joined if self.of_rows else torch.cat
        x = join_inputs([n.x for n in notes if n.x is not None]) if needs[0] else None
        h = torch.cat([n.h for n in notes]) if needs[1] else None
        notes.clear()
        rows: list[Tensor | None] = [None] * len(needs[4:])
        if any(needs[4:]):
            row_grads = multiply_back(grad, self.weights.input).chunk(len(calls))
            for call, row_grad in zip(calls, row_grads, strict=True):
                rows[call] = row_grad
        found = weight_gradients(grad, reset_grad, x, h, needs, totals)
        return *found, *rows


def input_bias_of(weights: CellWeights, *, resets: bool) -> Tensor | None:
    """What is added to the products of the input: both biases, unless a gate multiplies one."""
    bias, hidden_bias = weights.input_bias, weights.hidden_bias
    if bias is None or hidden_bias is None or resets:
        return None if bias is None else bias.detach()
    return bias.detach() + hidden_bias.detach()


def weight_gradients(
    grad: Tensor,
    reset_grad: Tensor | None,
    x: Tensor | None,
    h: Tensor | None,
    needs: Sequence[bool],
    totals: Tensors,
) -> Gradients:
    """Those of a cell's weights, over many rows, from those of the gates' sums: [R, G*H].

    That of the part which a gate multiplies is given beside, [R, H]. x: [R, K], h: [R, H], or None
    where no weight needs it.
    """
    input_grad = add_weight_gradient(totals[0], grad, x) if needs[0] and x is not None else None
    hidden_grad = None
    if needs[1] and h is not None:
        hidden_grad = _hidden_gradient(totals[1], grad, reset_grad, h)
    input_bias = add_sum(totals[2], grad) if needs[2] else None
    if not needs[3]:
        return input_grad, hidden_grad, input_bias, None
    if reset_grad is not None:
        grad = torch.cat([grad[:, : -reset_grad.shape[1]], reset_grad], 1)
    return input_grad, hidden_grad, input_bias, add_sum(totals[3], grad)


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


class CellNode(torch.autograd.Function):
    """One call, with its gates in a slot of the record."""

    @staticmethod
    def forward(
        ctx: Any, record: CellRecord, call: int, _token: Tensor, x: Tensor, *states: Tensor
    ) -> Any:
        """The new states."""
        ctx.set_materialize_grads(False)
        ctx.record, ctx.call, ctx.is_seen = record, call, is_seen()
        slot = record.slots[call]
        if not record.of_rows:
            write_product(slot, x, record.weights.input, record.input_bias)
        new_states, kept = record.cell.run(slot, states, record.weights)
        if record.reset_slots is not None:
            kept = record.reset_slots[call].copy_(kept)  # type: ignore[arg-type]
        # What a frozen weight is multiplied by may be written to.
        x_kept = x if record.weights.input.requires_grad else None
        ctx.save_for_backward(slot, x_kept, kept, *states)
        return new_states

    @staticmethod
    @undisturbed
    def backward(ctx: Any, *grads: Any) -> Any:
        """Gradients of x and the states; those of the gates are left to the tap."""
        if grads[0] is None and grads[-1] is None:  # two at most
            return (None,) * len(ctx.needs_input_grad)
        record: CellRecord = ctx.record
        begin_backward(record.versions)
        slot, x, kept, *states = ctx.saved_tensors
        # Another backward may need them.
        if ctx.is_seen or torch._C._autograd._get_current_graph_task_keep_graph():
            slot, kept = slot.clone(), None if kept is None else kept.clone()
        weights, needs = record.weights, ctx.needs_input_grad
        call = slot, states, kept, weights.hidden, needs[4:]
        reset_slot, state_grads = record.cell.gradients(grads, call)
        record.leave(ctx.call, Note(slot, reset_slot, x, states[0]))
        is_wanted = needs[3] and not record.of_rows
        x_grad = multiply_back(slot, weights.input) if is_wanted else None
        return None, None, None, x_grad, *state_grads


def is_seen() -> bool:
    """Whether hooks see what is saved: those of a checkpoint hand one memory to two graphs."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
