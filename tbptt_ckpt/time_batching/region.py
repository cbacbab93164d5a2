"""One run of steps with time batching: which operations take part, and what they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tbptt_ckpt.time_batching.candidates import Candidate, is_plain, transposed_weight
from tbptt_ckpt.time_batching.cell_calls import CellCalls
from tbptt_ckpt.time_batching.operations import Embedding, Linear, Product
from tbptt_ckpt.time_batching.products import multiply
from tbptt_ckpt.time_batching.recorded import CallsOfRows, RecordedCalls
from tbptt_ckpt.time_batching.report import CHANGED, SMALL, Tally
from tbptt_ckpt.time_batching.rows import InputRows, Row


class Region:
    """Operations of one run of steps.

    Args:
        num_steps: Of the run.
        tally: Counts what was batched and what not.
        pays: Whether batching gains time for a weight of so many elements.

    Attributes:
        chooses: Whether only what gains time is batched, and not all that can be.
        rows: The inputs of the steps.
        cells: Runs the cells.
    """

    def __init__(self, num_steps: int, tally: Tally, pays: Callable[[int], bool]) -> None:
        self.chooses = not pays(1)
        self.rows = InputRows()
        self.cells = CellCalls(num_steps, pays, tally, self.rows)
        self._tally, self._pays = tally, pays
        self._calls: dict[Any, RecordedCalls] = {}

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """`F.linear`, or None where the plain operation is to do it."""
        device = weight.device.type
        cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        candidate = Candidate("linear", Linear, weight, bias, cast=cast)
        if not self._takes(candidate, (x,)) or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
            return None
        output = self._of_row(candidate, self.rows.find(x) if cast is None else None)
        if output is not None:
            return output
        if torch.is_grad_enabled():
            return self._record_flat(candidate, x if cast is None else x.to(cast), 1)
        return multiply(x, weight, bias) if cast is None and x.dim() == 2 else None

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        """`x @ weight + bias`, or None where the plain operation is to do it.

        Args:
            x: [..., K].
            weight: [K, M], a weight or the transpose of one.
            bias: [M], or None.
        """
        if not isinstance(weight, Tensor) or not isinstance(x, Tensor) or weight.dim() != 2:
            return None
        transposed = transposed_weight(weight)
        if transposed is not None:
            return self.linear(x, transposed, bias)
        if not torch.is_grad_enabled() or x.dim() < 2 or x.shape[-1] != weight.shape[0]:
            return None
        candidate = Candidate("matmul", Product, weight, bias)
        return self._record_flat(candidate, x, 1) if self._takes(candidate, (x,)) else None

    def embedding(self, indices: Tensor, weight: Tensor, padding_idx: int) -> Tensor | None:
        """`F.embedding`, or None where the plain operation is to do it."""
        make = partial(Embedding, padding_idx=padding_idx)
        candidate = Candidate("embedding", make, weight, options=padding_idx)
        if not is_plain(indices) or not self._takes(candidate, ()):
            return None
        row = self.rows.find(indices)
        # A step with an index of no word may be one that the module skips.
        if row is not None and row.rows.bounds[0] >= 0 and row.rows.bounds[1] < len(weight):
            output = self._of_row(candidate, row)
            if output is not None:
                return output
        if not torch.is_grad_enabled() or not indices.dim():
            return None
        return self._record_flat(candidate, indices, 0)

    def recorded(self, candidate: Candidate, *inputs: Tensor) -> Tensor | None:
        """An operation that leaves its weight gradient to the tap; None if it must not.

        Args:
            candidate: What to do.
            inputs: Its inputs; calls may differ in their first dimension only.
        """
        if not torch.is_grad_enabled() or not self._takes(candidate, inputs):
            return None
        return self._record(candidate, inputs)

    def close(self) -> None:
        """The steps are done."""
        self.cells.close()

    def _takes(self, candidate: Candidate, inputs: Sequence[Any]) -> bool:
        """Whether an operation may and should take part."""
        reason = candidate.reason_to_leave(inputs)
        if not reason and not self._pays(candidate.weight.numel()):
            reason = SMALL
        if reason:
            self._tally.left(candidate.name, reason)
        return not reason

    def _of_row(self, candidate: Candidate, row: Row | None) -> Tensor | None:
        """One row of what is made of all of them; None where it has been given out, or is none."""
        if row is None:
            return None
        key = (candidate.key, torch.is_grad_enabled())
        calls: CallsOfRows | None = row.rows.made.get(key)
        if calls is None:
            calls = row.rows.made[key] = CallsOfRows(candidate, row.rows)
            self._tally.batched(f"{candidate.name} of inputs", tuple(candidate.weight.shape))
        made = calls.take(row.position)
        return None if made is None else self.rows.add(made)

    def _record_flat(self, candidate: Candidate, x: Tensor, width_dims: int) -> Tensor | None:
        """An operation on the last `width_dims` dimensions of x, each of the others a row."""
        if x.dim() == 1 + width_dims:
            return self._record(candidate, (x,))
        lead, width = x.shape[: x.dim() - width_dims], x.shape[x.dim() - width_dims :]
        output = self._record(candidate, (x.reshape(-1, *width),))
        return None if output is None else output.view(*lead, output.shape[-1])

    def _record(self, candidate: Candidate, inputs: Sequence[Tensor]) -> Tensor | None:
        weight, reason = candidate.weight, ""
        key = (candidate.key, tuple(x.shape[1:] for x in inputs))
        calls = self._calls.get(key)
        if not weight.requires_grad:
            reason = "a frozen weight"
        elif candidate.cast is None and torch.is_autocast_enabled(weight.device.type):
            reason = "autocast"
        elif calls is not None and calls.moved():
            reason = CHANGED
        if reason:
            self._tally.left(candidate.name, reason)
            return None
        if calls is None:
            calls = self._calls[key] = RecordedCalls(candidate)
            self._tally.batched(candidate.name, tuple(weight.shape))
        return calls(*inputs)
