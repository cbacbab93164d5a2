"""One run of steps with time batching: which operations take part, and what they share."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from tbptt_ckpt.time_batching.candidates import (
    CHANGED,
    COMPUTED,
    SHAPES,
    Candidate,
    Tally,
    autocast_dtype,
    is_plain,
    transposed_weight,
)
from tbptt_ckpt.time_batching.cell_calls import CellCalls
from tbptt_ckpt.time_batching.operations import Embedding, Linear, Operation, Product
from tbptt_ckpt.time_batching.products import multiply
from tbptt_ckpt.time_batching.recorded import CallsOfRows, RecordedCalls
from tbptt_ckpt.time_batching.rows import InputRows, Row


class Region:
    """Operations of one run of steps; those whose weight has `smallest` elements are batched."""

    def __init__(self, num_steps: int, tally: Tally, smallest: int) -> None:
        self.chooses = smallest > 1  # rather than batching all that can be
        self.rows = InputRows()
        self.cells = CellCalls(num_steps, smallest, tally, self.rows)
        self._tally, self._smallest = tally, smallest
        self._candidates: dict[Hashable, tuple[Candidate, str]] = {}
        self._calls: dict[Candidate, RecordedCalls] = {}

    def leave(self, name: str, reason: str) -> None:
        """Take note of a call, or a function, that is left to the plain operation."""
        self._tally[name, (), reason] += 1

    def linear(
        self,
        input: Tensor,  # noqa: A002
        weight: Tensor,
        bias: Tensor | None = None,
    ) -> Tensor | None:
        """`F.linear`, or None where the plain operation is to do it."""
        x, cast = input, autocast_dtype(weight)
        candidate = self._find(Linear, weight, bias, (x,), cast=cast)
        if candidate is None or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
            return None
        if bias is not None and bias.shape != weight.shape[:1]:
            self.leave(Linear.name, SHAPES)
            return None
        output = self._of_row(candidate, self.rows.find(x)) if cast is None else None
        if output is not None:
            return output
        if torch.is_grad_enabled():
            return self._record(candidate, x if cast is None else x.to(cast), 1)
        return multiply(x, weight, bias) if cast is None and x.dim() == 2 else None

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        """`x @ weight + bias`; None where the plain operation is to do it.

        For x: [..., K], weight: [K, M], which may be the transpose of a weight, and bias: [M].
        """
        if not isinstance(weight, Tensor) or not isinstance(x, Tensor) or weight.dim() != 2:
            return None
        if bias is not None and not (isinstance(bias, Tensor) and bias.shape == weight.shape[1:]):
            return None
        transposed = transposed_weight(weight)
        if transposed is not None:
            return self.linear(x, transposed, bias)
        if not torch.is_grad_enabled() or x.dim() < 2 or x.shape[-1] != weight.shape[0]:
            return None
        candidate = self._find(Product, weight, bias, (x,))
        return None if candidate is None else self._record(candidate, x, 1)

    def matrix_product(self, *operands: Any) -> Tensor | None:
        """`torch.mm`, or `torch.addmm` with the bias first."""
        *bias, x, weight = operands
        return self.product(x, weight, *bias) if isinstance(x, Tensor) and x.dim() == 2 else None

    def embedding(
        self,
        input: Tensor,  # noqa: A002
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Tensor | None:
        """`F.embedding`, or None where the plain operation is to do it."""
        if not is_plain(input) or not is_plain(weight):
            return None
        words, padding = len(weight), -1 if padding_idx is None else padding_idx
        if max_norm is not None or scale_grad_by_freq or sparse:
            self.leave(Embedding.name, "max_norm, scale_grad_by_freq or sparse")
            return None
        options = (-1 if padding_idx is None else padding % words,)
        candidate = self._find(Embedding, weight, None, (), options)
        if candidate is None:
            return None
        # A step with an index of no word may be one that the module skips. On a device the host
        # would wait to see that.
        row = self.rows.find(input) if input.is_cpu else None
        if row is not None and row.rows.bounds[0] >= 0 and row.rows.bounds[1] < words:
            output = self._of_row(candidate, row)
            if output is not None:
                return output
        if not torch.is_grad_enabled() or not input.dim():
            return None
        return self._record(candidate, input, 0)

    def recorded(
        self,
        kind: type[Operation],
        inputs: Sequence[Tensor],
        weight: Tensor,
        bias: Tensor | None,
        options: tuple[Any, ...] = (),
    ) -> Tensor | None:
        """An operation that leaves its weight gradient to the tap; None if it must not.

        Calls that differ in more than the first dimension of their inputs are told apart.
        """
        if not torch.is_grad_enabled():
            return None
        shapes = tuple(x.shape[1:] for x in inputs)
        candidate = self._find(kind, weight, bias, inputs, options, shapes=shapes)
        calls = None if candidate is None else self._calls_of(candidate)
        return None if calls is None else calls(*inputs)

    def _find(
        self,
        kind: type[Operation],
        weight: Tensor,
        bias: Tensor | None,
        inputs: Sequence[Any],
        options: tuple[Any, ...] = (),
        cast: torch.dtype | None = None,
        shapes: Hashable = (),
    ) -> Candidate | None:
        """The candidate, if a call of it with these inputs may and should take part."""
        key = (kind, id(weight), id(bias), options, cast, shapes)
        found = self._candidates.get(key)
        if found is None:
            candidate = Candidate(kind, weight, bias, options, cast)
            reason = candidate.reason_to_leave(self._smallest)
            found = candidate, reason
            if reason != COMPUTED:
                self._candidates[key] = found  # which holds the weights: their ids stay their own
        candidate, reason = found
        reason = reason or candidate.misfit(inputs)
        if not reason:
            return candidate
        self.leave(kind.name, reason)
        return None

    def _of_row(self, candidate: Candidate, row: Row | None) -> Tensor | None:
        """One row of what is made of all of them; None where it has been given out, or is none."""
        if row is None:
            return None
        key = (candidate, torch.is_grad_enabled())
        calls: CallsOfRows | None = row.rows.made.get(key)
        if calls is None:
            calls = row.rows.made[key] = CallsOfRows(candidate, row.rows)
            self._tally[f"{candidate.kind.name} of inputs", tuple(candidate.weight.shape), ""] += 1
        made = calls.take(row.position)
        return None if made is None else self.rows.add(made)

    def _record(self, candidate: Candidate, x: Tensor, width_dims: int) -> Tensor | None:
        """An operation on the last `width_dims` dimensions of x, each of the others a row."""
        calls = self._calls_of(candidate)
        if calls is None:
            return None
        if x.dim() == 1 + width_dims:
            return calls(x)
        lead, width = x.shape[: x.dim() - width_dims], x.shape[x.dim() - width_dims :]
        output = calls(x.reshape(-1, *width))
        return output.view(*lead, output.shape[-1])

    def _calls_of(self, candidate: Candidate) -> RecordedCalls | None:
        """The calls that a call joins; None where it must not."""
        weight, reason = candidate.weight, ""
        calls = self._calls.get(candidate)
        if not weight.requires_grad:
            reason = "a frozen weight"
        elif candidate.cast is None and autocast_dtype(weight) is not None:
            reason = "autocast"
        elif calls is not None and calls.versions.changed():
            reason = CHANGED
        if reason:
            self.leave(candidate.kind.name, reason)
            return None
        if calls is None:
            calls = self._calls[candidate] = RecordedCalls(candidate)
            self._tally[candidate.kind.name, tuple(weight.shape), ""] += 1
        return calls
