"""One run of steps with time batching: which operations take part, and what they share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tbptt_ckpt.time_batching.cell_calls import CellCalls
from tbptt_ckpt.time_batching.operations import Embedding, Linear, MakeOperation, Product
from tbptt_ckpt.time_batching.products import multiply
from tbptt_ckpt.time_batching.recorded import CallsOfRows, RecordedCalls
from tbptt_ckpt.time_batching.report import CHANGED, SMALL, Tally
from tbptt_ckpt.time_batching.rows import InputRows, Row
from tbptt_ckpt.time_batching.weights import is_plain, reason_to_leave, transposed_weight


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
        autocast = is_plain(x) and torch.is_autocast_enabled(x.device.type)
        cast = torch.get_autocast_dtype(x.device.type) if autocast else None
        if not self._takes("linear", (x,), weight, bias, cast):
            return None
        if weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
            return None
        row = self.rows.find(x) if cast is None else None
        if row is not None:
            output = self._of_row("linear", Linear, row, weight, bias)
            if output is not None:
                return output
        if torch.is_grad_enabled():
            x = x if cast is None else x.to(cast)
            return self._record_flat("linear", Linear, x, 1, weight, bias, cast=cast)
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
        if not self._takes("matmul", (x,), weight, bias):
            return None
        return self._record_flat("matmul", Product, x, 1, weight, bias)

    def embedding(self, indices: Tensor, weight: Tensor, padding_idx: int) -> Tensor | None:
        """`F.embedding`, or None where the plain operation is to do it."""
        if not is_plain(indices) or not self._takes("embedding", (), weight, None):
            return None
        make = partial(Embedding, padding_idx=padding_idx)
        row = self.rows.find(indices)
        # A step with an index of no word may be one that the module skips.
        if row is not None and row.rows.bounds[0] >= 0 and row.rows.bounds[1] < len(weight):
            output = self._of_row("embedding", make, row, weight, None, padding_idx)
            if output is not None:
                return output
        if not torch.is_grad_enabled() or not indices.dim():
            return None
        return self._record_flat("embedding", make, indices, 0, weight, None, padding_idx)

    def recorded(
        self,
        name: str,
        make: MakeOperation,
        inputs: tuple[Tensor, ...],
        weight: Tensor,
        bias: Tensor | None,
        *options: Any,
    ) -> Tensor | None:
        """An operation that leaves its weight gradient to the tap; None if it must not.

        Args:
            name: For the report.
            make: Makes the operation of a weight and bias without a graph.
            inputs: Its inputs; calls may differ in their first dimension only.
            weight: Its weight.
            bias: Its bias, or None.
            options: What else tells it from others of the same weight.
        """
        if not torch.is_grad_enabled() or not self._takes(name, inputs, weight, bias):
            return None
        return self._record(name, make, inputs, weight, bias, *options)

    def close(self) -> None:
        """The steps are done."""
        self.cells.close()

    def _takes(
        self,
        name: str,
        inputs: tuple[Any, ...],
        weight: Tensor,
        bias: Tensor | None,
        cast: torch.dtype | None = None,
    ) -> bool:
        """Whether an operation may and should take part."""
        reason = reason_to_leave(inputs, weight, bias, cast)
        if not reason and not self._pays(weight.numel()):
            reason = SMALL
        if reason:
            self._tally.left(name, reason)
        return not reason

    def _of_row(
        self,
        name: str,
        make: MakeOperation,
        row: Row,
        weight: Tensor,
        bias: Tensor | None,
        *options: Any,
    ) -> Tensor | None:
        """One row of what an operation makes of all of them; None where it has been given out."""
        key = (name, id(weight), id(bias), options, torch.is_grad_enabled())
        calls: CallsOfRows | None = row.rows.made.get(key)
        if calls is None:
            calls = row.rows.made[key] = CallsOfRows(make, row.rows, weight, bias)
            self._tally.batched(f"{name} of inputs", tuple(weight.shape))
        made = calls.take(row.position)
        if made is None:
            return None
        self.rows.add(made)
        return made.rows.entries[made.position]

    def _record_flat(
        self,
        name: str,
        make: MakeOperation,
        x: Tensor,
        width_dims: int,
        weight: Tensor,
        bias: Tensor | None,
        *options: Any,
        cast: torch.dtype | None = None,
    ) -> Tensor | None:
        """An operation on the last `width_dims` dimensions of x, each of the others a row."""
        lead, width = x.shape[: x.dim() - width_dims], x.shape[x.dim() - width_dims :]
        if len(lead) == 1:
            return self._record(name, make, (x,), weight, bias, *options, cast=cast)
        flat = (x.reshape(-1, *width),)
        output = self._record(name, make, flat, weight, bias, *options, cast=cast)
        return None if output is None else output.view(*lead, output.shape[-1])

    def _record(
        self,
        name: str,
        make: MakeOperation,
        inputs: tuple[Tensor, ...],
        weight: Tensor,
        bias: Tensor | None,
        *options: Any,
        cast: torch.dtype | None = None,
    ) -> Tensor | None:
        if not weight.requires_grad:
            self._tally.left(name, "a frozen weight")
            return None
        if cast is None and torch.is_autocast_enabled(weight.device.type):
            self._tally.left(name, "autocast")
            return None
        shapes = tuple(x.shape[1:] for x in inputs)
        key = (name, id(weight), id(bias), options, shapes, cast)
        calls = self._calls.get(key)
        if calls is None:
            calls = self._calls[key] = RecordedCalls(make, weight, bias, cast)
            self._tally.batched(name, tuple(weight.shape))
        if calls.moved():
            self._tally.left(name, CHANGED)
            return None
        return calls(*inputs)
