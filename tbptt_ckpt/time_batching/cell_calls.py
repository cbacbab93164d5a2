"""The calls of recurrent cells within one run of steps."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from tbptt_ckpt.time_batching.candidates import (
    CHANGED,
    COMPLEX,
    COMPUTED,
    DTYPES,
    SHAPES,
    SMALL,
    TYPES,
    Tally,
    autocast_dtype,
    is_plain,
    is_stable,
)
from tbptt_ckpt.time_batching.cells import Cell, CellNode, CellRecord, CellWeights, input_bias_of
from tbptt_ckpt.time_batching.products import multiply
from tbptt_ckpt.time_batching.rows import InputRows, Rows
from tbptt_ckpt.time_batching.taps import Tap, Versions

# A buffer for calls that bring their input is made for at most so many bytes at a time.
_BUFFER_BYTES = 8 << 20
_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class _Calls:
    """Calls of one cell that share a buffer: a slot for each; in a leaf with a record and token."""

    def __init__(
        self,
        cell: Cell,
        weights: CellWeights,
        slots: Sequence[Tensor],
        record: CellRecord | None = None,
        rows: Sequence[Tensor] = (),
    ) -> None:
        self.num_used, self.num_slots, self._is_used = 0, len(slots), [False] * len(slots)
        self._cell, self._weights, self._slots, self._record = cell, weights, slots, record
        # Not in the record: the token's node holds that, and the two would hold each other.
        tapped = (*weights, *rows)
        self._token = record and Tap.apply(record, weights, *tapped)  # type: ignore[no-untyped-call]
        self._versions = Versions(*weights)

    def call(self, index: int, x: Tensor, states: Sequence[Tensor]) -> Any:
        """A call's result, with the slot at an index; None if it must not have that."""
        if self._is_used[index] or self._versions.changed():
            return None
        self._is_used[index] = True
        self.num_used += 1
        if self._record is None:
            return self._cell.run(self._slots[index], states, self._weights)[0]
        return CellNode.apply(self._record, index, self._token, x, *states)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """No call is to come."""
        if self._record is not None:
            self._record.close()


class CellCalls:
    """Runs the cells of a `Region`: `RNNCell`, `LSTMCell` and `GRUCell`."""

    def __init__(self, num_steps: int, smallest: int, tally: Tally, rows: InputRows) -> None:
        self._num_steps, self._smallest, self._tally, self._rows = num_steps, smallest, tally, rows
        self._weights: dict[int, CellWeights] = {}
        self._held: list[CellWeights] = []
        self._own: dict[Any, _Calls] = {}
        self._biases: dict[Any, Tensor | None] = {}

    def call(self, cell: nn.RNNCellBase, kind: Cell, x: Tensor, states: tuple[Any, ...]) -> Any:
        """The result for x: [N, K] and states: [N, H]; None where the plain cell is to make it."""
        weights = self._weights_of(cell)
        if weights is None:
            return self._left(kind, COMPUTED)
        if reason := _misfit(x, states, weights):
            return self._left(kind, reason)
        if weights.hidden.numel() < self._smallest:
            return self._left(kind, SMALL)
        row = self._rows.find(x)
        if row is not None:
            calls = self._calls_of_rows(kind, row.rows, weights)
            result = calls.call(row.position, x, states)
            if result is not None:
                return result
        if not torch.is_grad_enabled():
            slot = multiply(x, weights.input, self._input_bias(kind, weights))
            return kind.run(slot, states, weights)[0]
        calls = self._own_calls(kind, x, weights)
        result = calls.call(calls.num_used, x, states)
        return self._left(kind, CHANGED) if result is None else result

    def _left(self, kind: Cell, reason: str) -> None:
        self._tally[kind.name, (), reason] += 1

    def _weights_of(self, cell: nn.RNNCellBase) -> CellWeights | None:
        """A cell's weights, the same object as long as they are the same; None if computed."""
        found, known = tuple(map(cell._parameters.get, _NAMES)), self._weights.get(id(cell))
        if known is not None and all(map(is_, known, found)):
            return known
        weight_ih, weight_hh, bias_ih, bias_hh = found
        alike = (bias_ih is None) == (bias_hh is None)
        if weight_ih is None or weight_hh is None or not alike or not all(map(is_stable, found)):
            return None
        weights = CellWeights(weight_ih, weight_hh, bias_ih, bias_hh)
        self._held.append(weights)  # so that its id stays its own
        self._weights[id(cell)] = weights
        return weights

    def close(self) -> None:
        """No call is to come."""
        for calls in self._own.values():
            calls.close()

    def _calls_of_rows(self, kind: Cell, rows: Rows, weights: CellWeights) -> _Calls:
        key = (kind.name, id(weights), torch.is_grad_enabled())
        known: _Calls | None = rows.made.get(key)
        if known is not None:
            return known
        flat, bias = rows.whole.flatten(0, -2), self._input_bias(kind, weights)
        with torch.no_grad():
            products = multiply(flat, weights.input.detach(), bias)
        buffer = products.view(*rows.whole.shape[:-1], -1)
        self._tally[f"{kind.name} of inputs", tuple(weights.hidden.shape), ""] += 1
        in_leaf = torch.is_grad_enabled()
        record = CellRecord(kind, weights, buffer, bias, of_rows=True) if in_leaf else None
        slots = buffer.unbind(0) if record is None else record.slots
        calls = rows.made[key] = _Calls(kind, weights, slots, record, rows.differentiable())
        return calls

    def _own_calls(self, kind: Cell, x: Tensor, weights: CellWeights) -> _Calls:
        """Calls that bring their input, with a slot for one more."""
        key = (kind.name, id(weights), x.shape[0])
        calls = self._own.get(key)
        if calls is not None:
            if calls.num_used < calls.num_slots:
                return calls
            calls.close()
        rows = weights.hidden.shape[0]
        step_bytes = x.shape[0] * rows * x.element_size()  # 0 where there are no lanes
        num_steps = max(1, min(self._num_steps, _BUFFER_BYTES // max(1, step_bytes)))
        self._tally[kind.name, tuple(weights.hidden.shape), ""] += 1
        buffer = x.new_empty(num_steps, x.shape[0], rows)
        record = CellRecord(kind, weights, buffer, self._input_bias(kind, weights), of_rows=False)
        calls = self._own[key] = _Calls(kind, weights, record.slots, record)
        return calls

    def _input_bias(self, kind: Cell, weights: CellWeights) -> Tensor | None:
        """What is added to the products of the input: both biases, unless r multiplies one."""
        bias, hidden_bias = weights.input_bias, weights.hidden_bias
        if bias is None or hidden_bias is None or kind.resets:
            return input_bias_of(weights, resets=kind.resets)
        key = (id(bias), id(hidden_bias), bias._version, hidden_bias._version)
        if key not in self._biases:
            self._biases[key] = input_bias_of(weights, resets=False)
        return self._biases[key]


def _misfit(x: Any, states: tuple[Any, ...], weights: CellWeights) -> str:
    """What is not as the cells here want it, for the plain cell to judge; empty if all is."""
    hidden = weights.hidden
    dtype = hidden.dtype
    if not is_plain(x):
        return TYPES
    if not x.is_cpu:
        return "a cell on another device than the CPU"
    if autocast_dtype(x):
        return "autocast"
    if x.dim() != 2:
        return "no batch of lanes"
    if not dtype.is_floating_point:
        return COMPLEX
    if x.dtype != dtype:
        return DTYPES
    if x.shape[1] != weights.input.shape[1]:
        return SHAPES
    shape = (x.shape[0], hidden.shape[1])
    for state in states:
        if not is_plain(state):
            return TYPES
        if state.dtype != dtype or state.shape != shape:
            return SHAPES if state.dtype == dtype else DTYPES
    return ""
