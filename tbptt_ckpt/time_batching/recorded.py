"""Operations as autograd nodes: one per call, or one for all rows of the inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tbptt_ckpt.module.host import sent
from tbptt_ckpt.time_batching.candidates import Candidate
from tbptt_ckpt.time_batching.operations import Operation
from tbptt_ckpt.time_batching.rows import Row, Rows, cut
from tbptt_ckpt.time_batching.taps import (
    Gradients,
    Record,
    Tap,
    Tensors,
    Versions,
    begin_backward,
    modified_in_place,
    undisturbed,
)

_Part = tuple[Tensor, Sequence[Tensor]]  # the gradient of a call's output, and its inputs


class _CallsRecord(Record[_Part]):
    def __init__(self, operation: Operation, weights: Tensors) -> None:
        super().__init__(*weights)
        self.operation = operation

    def collect(self, parts: dict[int, _Part], needs: Sequence[bool], totals: Tensors) -> Gradients:
        """The gradients of weight and bias."""
        grad = torch.cat([grad for grad, _ in parts.values()])
        inputs = [torch.cat(c) for c in zip(*(x for _, x in parts.values()), strict=True)]
        parts.clear()
        return self.operation.weight_gradients(grad, inputs, needs, totals)


class _Call(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, record: _CallsRecord, call: int, _token: Tensor, *inputs: Tensor
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        ctx.record, ctx.call = record, call
        return record.operation.run(*inputs)

    @staticmethod
    @undisturbed
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        record: _CallsRecord = ctx.record
        begin_backward(record.versions)
        inputs = ctx.saved_tensors
        record.leave(ctx.call, (grad, inputs))
        needs = ctx.needs_input_grad[3:]
        return None, None, None, *record.operation.input_gradients(grad, inputs, needs)


class RecordedCalls:
    """Calls of one operation in a leaf, which leave their weight gradient to a tap."""

    def __init__(self, candidate: Candidate) -> None:
        tapped = candidate.tapped()
        self.versions, self._num_calls = Versions(candidate.weight, candidate.bias), 0
        self._record = _CallsRecord(candidate.operation(*tapped), tapped)
        # Not in the record: the token's node holds that, and the two would hold each other.
        self._token = Tap.apply(self._record, tapped, *tapped)  # type: ignore[no-untyped-call]

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The operation of the inputs, whose first dimension calls may differ in."""
        call, self._num_calls = self._num_calls, self._num_calls + 1
        output: Tensor = _Call.apply(self._record, call, self._token, *inputs)  # type: ignore[no-untyped-call]
        return output


_Known = tuple[Operation, Sequence[Tensor], Versions]  # and the versions of the rows


class _OfRows(torch.autograd.Function):
    """From an operation's result for all rows to a tensor for each of them.

    A row that was not used has no part in the gradient, whatever it holds: it may be no number.
    All were read before the module has written into the first. That it writes into one after its
    use, whose version says so, is an error, as where each step saves its own input.
    """

    @staticmethod
    def forward(
        ctx: Any, known: _Known, x: Tensor, result: Tensor, *_edges: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        ctx.known, ctx.rescued = known, None
        return tuple(cut(result))

    @staticmethod
    @undisturbed
    def backward(ctx: Any, *grads: Any) -> Any:
        unused = [index for index, grad in enumerate(grads) if grad is None]
        needs, row_needs = ctx.needs_input_grad[3:5], ctx.needs_input_grad[5:]
        if len(unused) == len(grads):
            return (None,) * len(ctx.needs_input_grad)
        operation, row_versions, versions = ctx.known
        begin_backward(versions)
        (x,) = ctx.saved_tensors if ctx.rescued is None else (ctx.rescued,)
        if unused:
            # A gradient taken within a step may free the node, to which the others come later.
            ctx.rescued = x
            x = x.index_fill(0, sent(torch.tensor(unused, device="cpu"), x.device), 0)
        zeros = torch.zeros_like(next(grad for grad in grads if grad is not None))
        grad = torch.stack([zeros if grad is None else grad for grad in grads])
        row_grads: Gradients = (None,) * len(row_needs)
        if any(row_needs):
            (whole,) = operation.input_gradients(grad, (x,), (True,))
            pairs = zip(grads, whole.unbind(0), strict=True)
            row_grads = tuple(None if grad is None else row_grad for grad, row_grad in pairs)
        pairs = zip(row_versions, grads, strict=False)  # a row that was used had version 0
        if needs[0] and any(row._version and grad is not None for row, grad in pairs):
            raise modified_in_place("inputs")
        weight_grads = operation.weight_gradients(grad, (x,), needs, (None, None))
        return (None,) * 3 + weight_grads + row_grads


class CallsOfRows:
    """An operation of all rows at once, whose result is given out row by row."""

    def __init__(self, candidate: Candidate, source: Rows) -> None:
        weight, bias = candidate.weight, candidate.bias
        operation, self._versions = candidate.operation(weight, bias), Versions(weight, bias)
        self._used = [False] * len(source.entries)
        with torch.no_grad():
            whole = operation.run(source.whole)
        if torch.is_grad_enabled():
            edges = (weight, bias, *source.differentiable())
            known = operation, source.versions(), self._versions
            entries = _OfRows.apply(known, source.whole, whole, *edges)  # type: ignore[no-untyped-call]
        else:
            entries = cut(whole)
        self._rows = Rows(whole, entries, is_made=True)

    def take(self, index: int) -> Row | None:
        """One row, to do with as the module likes; None from the second time on."""
        if self._versions.changed() or self._used[index]:
            return None
        self._used[index] = True
        return Row(self._rows, index)

    def close(self) -> None:
        """The steps of the source are done."""
        self._rows.close()
