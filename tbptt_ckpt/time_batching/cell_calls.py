"""The calls of recurrent cells within one run of steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tbptt_ckpt.time_batching.cells import CellRecord, CellWeights
from tbptt_ckpt.time_batching.gru import GRUNode, gru_step
from tbptt_ckpt.time_batching.lstm import LSTMNode, lstm_step
from tbptt_ckpt.time_batching.products import multiply
from tbptt_ckpt.time_batching.report import SMALL, Tally
from tbptt_ckpt.time_batching.rnn import RNNNode, rnn_step
from tbptt_ckpt.time_batching.rows import Row, is_plain, is_stable
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
        pays: As for `Region`.
        tally: As for `Region`.
        find_row: The row of the segment's inputs that a tensor is, if it is one.
    """

    def __init__(
        self,
        num_steps: int,
        pays: Callable[[int, int], bool],
        tally: Tally,
        find_row: Callable[[Tensor], Row | None],
    ) -> None:
        self._num_steps, self._pays = num_steps, pays
        self._tally, self._find_row = tally, find_row
        self._weights: dict[int, CellWeights] = {}
        self._held: list[CellWeights] = []
        self._own: dict[Any, _Calls] = {}
        self._records: list[CellRecord] = []
        self._biases: dict[Any, Tensor | None] = {}

    def call(self, cell: nn.RNNCellBase, kind: str, x: Tensor, states: tuple[Any, ...]) -> Any:
        """The cell's result, or None where the plain operation is to do it.

        Args:
            cell: The module.
            kind: "LSTMCell", "GRUCell", "RNNCell tanh" or "RNNCell relu".
            x: [N, K].
            states: [N, H] each.
        """
        weights = self._weights_of(cell, kind)
        if weights is None:
            return None
        if not _fits(x, states, weights):
            self._tally.left(kind, "no batch of lanes, autocast, or dtypes or shapes that differ")
            return None
        if not self._pays(x.shape[0], weights.hidden.numel()):
            self._tally.left(kind, SMALL)
            return None
        grad = torch.is_grad_enabled()
        key = (kind, id(weights), grad)
        row = self._find_row(x)
        if row is not None:
            calls = row.rows.made.get(key)
            if calls is None:
                calls = row.rows.made[key] = self._calls_of_rows(kind, row, weights, grad)
            if not calls.used[row.index] and not calls.moved():
                calls.used[row.index] = True
                return self._run(kind, calls, row.index, None, states)
        if not grad:
            slot = multiply(x, weights.input, self._input_bias(kind, weights))
            return _advance(kind, slot, states, weights)
        calls = self._own.get((key, x.shape[0]))
        if calls is None or calls.next == len(calls.slots):
            calls = self._own[key, x.shape[0]] = self._calls_with_inputs(kind, x, weights)
        if calls.moved():
            self._tally.left(kind, "a weight that changed within the segment")
            return None
        index, calls.next = calls.next, calls.next + 1
        return self._run(kind, calls, index, x, states)

    def _weights_of(self, cell: nn.RNNCellBase, kind: str) -> CellWeights | None:
        """A cell's weights, the same object as long as they are the same; None if computed."""
        get = cell._parameters.get
        known = self._weights.get(id(cell))
        if (
            known is not None
            and known.input is get("weight_ih")
            and known.hidden is get("weight_hh")
            and known.input_bias is get("bias_ih")
            and known.hidden_bias is get("bias_hh")
        ):
            return known
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        found = [get(name) for name in names]
        biases = (found[2] is None) == (found[3] is None)
        if found[0] is None or found[1] is None or not biases:
            self._tally.left(kind, "a weight that is computed in the step")
            return None
        if not all(weight is None or is_stable(weight) for weight in found):
            self._tally.left(kind, "a weight that is computed in the step")
            return None
        weights = CellWeights(found[0], found[1], found[2], found[3])
        self._held.append(weights)  # so that its id stays its own
        self._weights[id(cell)] = weights
        return weights

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


def _fits(x: Any, states: tuple[Any, ...], weights: CellWeights) -> bool:
    """Whether all is as the cells here want it; what does not fit is the plain cell's to judge."""
    hidden = weights.hidden
    dtype = hidden.dtype
    if not is_plain(x) or x.dim() != 2 or x.dtype != dtype or x.device.type != "cpu":
        return False
    if x.shape[1] != weights.input.shape[1] or torch.is_autocast_enabled("cpu"):
        return False
    shape = (x.shape[0], hidden.shape[1])
    return all(is_plain(s) and s.dtype == dtype and s.shape == shape for s in states)


def _advance(kind: str, slot: Tensor, states: tuple[Tensor, ...], weights: CellWeights) -> Any:
    """One step without a graph; the slot holds the products of the input."""
    h = states[0]
    if kind == "LSTMCell":
        return lstm_step(slot, h, states[1], weights.hidden)
    if kind == "GRUCell":
        return gru_step(slot, h, weights.hidden, weights.hidden_bias)[0]
    return rnn_step(slot, h, weights.hidden, kind == "RNNCell tanh")
