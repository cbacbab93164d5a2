"""The calls of recurrent cells within one run of steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tbptt_ckpt.time_batching.candidates import COMPUTED, autocast_dtype, is_plain, is_stable
from tbptt_ckpt.time_batching.cells import Cell, CellNode, CellRecord, CellWeights
from tbptt_ckpt.time_batching.products import multiply
from tbptt_ckpt.time_batching.report import CHANGED, SMALL, Tally
from tbptt_ckpt.time_batching.rows import InputRows, Rows
from tbptt_ckpt.time_batching.taps import Versions, tap

# A buffer for calls that bring their input is made for at most so many bytes at a time.
_BUFFER_BYTES = 8 << 20


class _Calls:
    """Calls of one cell that share a buffer: a slot for each; in a leaf with a record and token."""

    def __init__(
        self,
        weights: CellWeights,
        slots: Sequence[Tensor],
        record: CellRecord | None = None,
        rows: Sequence[Tensor] = (),
    ) -> None:
        self.num_used, self._weights, self._slots, self._record = 0, weights, slots, record
        # Not in the record: the token's node holds that, and the two would hold each other.
        self._token = None if record is None else tap(record, weights, rows)
        self._versions, self._is_used = Versions(*weights), [False] * len(slots)

    @property
    def is_full(self) -> bool:
        """Whether every slot is taken."""
        return self.num_used == len(self._slots)

    def take(self, index: int) -> bool:
        """Whether a call may have the slot at an index."""
        if self._is_used[index] or self._versions.moved():
            return False
        self._is_used[index] = True
        self.num_used += 1
        return True

    def run(self, index: int, cell: Cell, x: Tensor, states: Sequence[Tensor]) -> Any:
        """One call, with the slot at an index."""
        if self._record is None:
            return cell.run(self._slots[index], states, self._weights)[0]
        return CellNode.apply(self._record, index, self._token, x, *states)  # type: ignore[no-untyped-call]

    def close(self, _source: object = None) -> None:
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
        if not _fits(x, states, weights):
            return self._left(kind, "no batch of lanes, autocast, or dtypes or shapes that differ")
        if weights.hidden.numel() < self._smallest:
            return self._left(kind, SMALL)
        row = self._rows.find(x)
        if row is not None:
            calls = self._calls_of_rows(kind, row.rows, weights)
            if calls.take(row.position):
                return calls.run(row.position, kind, x, states)
        if not torch.is_grad_enabled():
            slot = multiply(x, weights.input, self._input_bias(kind, weights))
            return kind.run(slot, states, weights)[0]
        calls = self._own_calls(kind, x, weights)
        index = calls.num_used
        return calls.run(index, kind, x, states) if calls.take(index) else self._left(kind, CHANGED)

    def _left(self, kind: Cell, reason: str) -> None:
        self._tally.left(kind.name, reason)

    def _weights_of(self, cell: nn.RNNCellBase) -> CellWeights | None:
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
        found = [get(name) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        biases = (found[2] is None) == (found[3] is None)
        if found[0] is None or found[1] is None or not biases or not all(map(is_stable, found)):
            return None
        weights = CellWeights(found[0], found[1], found[2], found[3])
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
        flat = rows.whole.reshape(-1, rows.whole.shape[-1])
        with torch.no_grad():
            products = multiply(flat, weights.input.detach(), self._input_bias(kind, weights))
        buffer = products.view(*rows.whole.shape[:-1], -1)
        self._tally.batched(f"{kind.name} of inputs", tuple(weights.hidden.shape))
        if torch.is_grad_enabled():
            record = CellRecord(kind, weights, buffer, self._input_bias(kind, weights), True)
            calls = _Calls(weights, record.slots, record, rows.differentiable())
        else:
            calls = _Calls(weights, buffer.unbind(0))
        rows.made[key] = calls
        return calls

    def _own_calls(self, kind: Cell, x: Tensor, weights: CellWeights) -> _Calls:
        """Calls that bring their input, with a slot for one more."""
        key = (kind.name, id(weights), x.shape[0])
        calls = self._own.get(key)
        if calls is not None and not calls.is_full:
            return calls
        if calls is not None:
            calls.close()
        rows = weights.hidden.shape[0]
        step_bytes = x.shape[0] * rows * x.element_size()
        num_steps = max(1, min(self._num_steps, _BUFFER_BYTES // step_bytes))
        self._tally.batched(kind.name, tuple(weights.hidden.shape))
        buffer = x.new_empty(num_steps, x.shape[0], rows)
        record = CellRecord(kind, weights, buffer, self._input_bias(kind, weights), False)
        calls = self._own[key] = _Calls(weights, record.slots, record)
        return calls

    def _input_bias(self, kind: Cell, weights: CellWeights) -> Tensor | None:
        """What is added to the products of the input: both biases, unless r multiplies one."""
        bias, hidden_bias = weights.input_bias, weights.hidden_bias
        if bias is None or hidden_bias is None or kind.resets:
            return None if bias is None else bias.detach()
        key = (id(bias), id(hidden_bias), bias._version, hidden_bias._version)
        if key not in self._biases:
            self._biases[key] = bias.detach() + hidden_bias.detach()
        return self._biases[key]


def _fits(x: Any, states: tuple[Any, ...], weights: CellWeights) -> bool:
    """Whether all is as the cells here want it; what does not fit is the plain cell's to judge."""
    hidden = weights.hidden
    dtype = hidden.dtype
    if not is_plain(x) or x.dim() != 2 or x.dtype != dtype or not x.is_cpu:
        return False
    if not dtype.is_floating_point or autocast_dtype(hidden) is not None:
        return False
    if x.shape[1] != weights.input.shape[1]:
        return False
    shape = (x.shape[0], hidden.shape[1])
    for state in states:
        if not is_plain(state) or state.dtype != dtype or state.shape != shape:
            return False
    return True
