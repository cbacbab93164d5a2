"""The calls of recurrent cells within one run of steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tbptt_ckpt.time_batching.cells import CellRecord, CellWeights
from tbptt_ckpt.time_batching.gru import GRUNode, gru_step
from tbptt_ckpt.time_batching.lstm import LSTMNode, lstm_step
from tbptt_ckpt.time_batching.products import multiply
from tbptt_ckpt.time_batching.report import Tally
from tbptt_ckpt.time_batching.rnn import RNNNode, rnn_step
from tbptt_ckpt.time_batching.rows import Row
from tbptt_ckpt.time_batching.taps import tap

# A buffer for calls that bring their input is made for at most so many bytes at a time.
_BUFFER_BYTES = 8 << 20


class _Calls:
    """Calls of one cell that share a buffer.

    Attributes:
        record: Their record in a leaf; None in an advance.
        token: Of the record.
        slots: Of an advance.
        used: Which slots are taken.
    """

    def __init__(
        self, weights: CellWeights, slots: list[Tensor], record: CellRecord | None, token: Any
    ) -> None:
        self.weights, self.slots, self.record, self.token = weights, slots, record, token
        self.used = [False] * len(slots)
        self.next = 0
        self.versions = [w._version for w in weights if w is not None]

    def moved(self) -> bool:
        """Whether a weight has been written to."""
        return self.versions != [w._version for w in self.weights if w is not None]


def _find_nothing(_: Tensor) -> None:
    """No tensor is a row any more."""


class CellCalls:
    """Runs cells: `RNNCell`, `LSTMCell` and `GRUCell`.

    Args:
        num_steps: Of the run of steps.
        smallest_work: As for `Region`.
        tally: As for `Region`.
        find_row: The row of the segment's inputs that a tensor is, if it is one.
    """

    def __init__(
        self,
        num_steps: int,
        smallest_work: int,
        tally: Tally,
        find_row: Callable[[Tensor], Row | None],
    ) -> None:
        self._num_steps, self._smallest_work = num_steps, smallest_work
        self._tally, self._find_row = tally, find_row
        self._own: dict[Any, _Calls] = {}
        self._records: list[CellRecord] = []
        self._biases: dict[Any, Tensor | None] = {}

    def call(self, kind: str, x: Tensor, states: tuple[Tensor, ...], weights: CellWeights) -> Any:
        """The cell's result, or None where the plain operation is to do it.

        Args:
            kind: "LSTMCell", "GRUCell", "RNNCell tanh" or "RNNCell relu".
            x: [N, K].
            states: [N, H] each.
            weights: The cell's.
        """
        lanes = x.shape[0]
        if lanes * weights.hidden.numel() < self._smallest_work:
            self._tally.left(kind, "too small to pay")
            return None
        grad = torch.is_grad_enabled()
        key = (kind, id(weights[0]), id(weights[1]), id(weights[2]), id(weights[3]), grad)
        row = self._find_row(x)
        if row is not None:
            calls = row.rows.made.get(key)
            if calls is None:
                calls = row.rows.made[key] = self._calls_of_rows(kind, row, weights, grad)
            if not calls.used[row.index] and not calls.moved():
                calls.used[row.index] = True
                return self._run(kind, calls, row.index, None, states)
        if not grad:
            bias = self._input_bias(kind, weights)
            slot = multiply(x, weights.input, bias)
            return _advance(kind, slot, states, weights)
        calls = self._own.get((key, lanes))
        if calls is None or calls.next == len(calls.slots):
            calls = self._own[key, lanes] = self._calls_with_inputs(kind, x, weights)
        if calls.moved():
            self._tally.left(kind, "a weight that changed within the segment")
            return None
        index, calls.next = calls.next, calls.next + 1
        return self._run(kind, calls, index, x, states)

    def close(self) -> None:
        """No call is to come."""
        for record in self._records:
            record.close()
        # The region, which is known here only by this method of its, would live on with all
        # that it holds until Python looks for circles.
        self._find_row = _find_nothing

    def _run(
        self, kind: str, calls: _Calls, index: int, x: Tensor | None, states: tuple[Tensor, ...]
    ) -> Any:
        record = calls.record
        if record is None:
            return _advance(kind, calls.slots[index], states, calls.weights)
        if kind == "LSTMCell":
            return LSTMNode.apply(record, index, calls.token, x, *states)  # type: ignore[no-untyped-call]
        if kind == "GRUCell":
            return GRUNode.apply(record, index, calls.token, x, *states)  # type: ignore[no-untyped-call]
        is_tanh = kind == "RNNCell tanh"
        return RNNNode.apply(record, index, calls.token, x, *states, is_tanh)  # type: ignore[no-untyped-call]

    def _calls_of_rows(self, kind: str, row: Row, weights: CellWeights, grad: bool) -> _Calls:
        whole = row.rows.whole
        flat = whole.detach().reshape(-1, whole.shape[-1])
        with torch.no_grad():
            products = multiply(flat, weights.input.detach(), self._input_bias(kind, weights))
        buffer = products.view(*whole.shape[:-1], -1)
        self._tally.batched(f"{kind} of inputs", tuple(weights.hidden.shape))
        if not grad:
            return _Calls(weights, list(buffer.unbind(0)), None, None)
        return self._recorded(kind, weights, buffer, whole)

    def _calls_with_inputs(self, kind: str, x: Tensor, weights: CellWeights) -> _Calls:
        rows = weights.hidden.shape[0]
        step_bytes = x.shape[0] * rows * x.element_size()
        num_steps = max(1, min(self._num_steps, _BUFFER_BYTES // step_bytes))
        self._tally.batched(kind, tuple(weights.hidden.shape))
        return self._recorded(kind, weights, x.new_empty(num_steps, x.shape[0], rows), None)

    def _recorded(
        self, kind: str, weights: CellWeights, buffer: Tensor, whole: Tensor | None
    ) -> _Calls:
        reset = None
        if kind == "GRUCell":
            reset = buffer.new_empty(*buffer.shape[:2], weights.hidden.shape[1])
        record = CellRecord(weights, buffer, self._input_bias(kind, weights), reset)
        self._records.append(record)
        return _Calls(weights, record.slots, record, tap(record, whole, *weights))

    def _input_bias(self, kind: str, weights: CellWeights) -> Tensor | None:
        """What is added to the products of the input: both biases, unless r multiplies one."""
        bias, hidden_bias = weights.input_bias, weights.hidden_bias
        if bias is None or hidden_bias is None or kind == "GRUCell":
            return None if bias is None else bias.detach()
        key = (id(bias), id(hidden_bias), bias._version, hidden_bias._version)
        if key not in self._biases:
            self._biases[key] = bias.detach() + hidden_bias.detach()
        return self._biases[key]


def _advance(kind: str, slot: Tensor, states: tuple[Tensor, ...], weights: CellWeights) -> Any:
    """One step without a graph; the slot holds the products of the input."""
    h = states[0]
    if kind == "LSTMCell":
        return lstm_step(slot, h, states[1], weights.hidden)
    if kind == "GRUCell":
        return gru_step(slot, h, weights.hidden, weights.hidden_bias)[0]
    return rnn_step(slot, h, weights.hidden, kind == "RNNCell tanh")
