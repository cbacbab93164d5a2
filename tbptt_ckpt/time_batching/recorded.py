"""Operations as autograd nodes: one per call, or one for all rows of the inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tbptt_ckpt.time_batching.candidates import Candidate
from tbptt_ckpt.time_batching.operations import Operation
from tbptt_ckpt.time_batching.rows import Row, Rows, cut
from tbptt_ckpt.time_batching.taps import (
    Gradients,
    Notes,
    Versions,
    begin_backward,
    modified_in_place,
    tap,
)


class _CallsRecord:
    """What the calls of one operation in a leaf leave to the tap."""

    def __init__(self, operation: Operation, weights: Sequence[Tensor | None]) -> None:
        self.operation, self.versions = operation, Versions(*weights)
        self.notes: Notes[tuple[Tensor, Sequence[Tensor]]] = Notes()

    def collect(self, needs: Sequence[bool], totals: Sequence[Tensor | None]) -> Gradients:
        """The gradients of weight and bias."""
        calls, parts = self.notes.take()
        if not calls:
            return None, None
        grad = torch.cat([grad for grad, _ in parts])
        inputs = [torch.cat(column) for column in zip(*(x for _, x in parts), strict=True)]
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
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        begin_backward()
        inputs = ctx.saved_tensors
        record: _CallsRecord = ctx.record
        record.versions.check()
        record.notes.leave(ctx.call, (grad, inputs))
        needs = ctx.needs_input_grad[3:]
        return None, None, None, *record.operation.input_gradients(grad, inputs, needs)


class RecordedCalls:
    """Calls of one operation in a leaf, which leave their weight gradient to a tap."""

    def __init__(self, candidate: Candidate) -> None:
        tapped = candidate.tapped()
        self._versions, self._num_calls = Versions(candidate.weight, candidate.bias), 0
        self._record = _CallsRecord(candidate.operation(*tapped), tapped)
        # Not in the record: the token's node holds that, and the two would hold each other.
        self._token = tap(self._record, tapped)

    def moved(self) -> bool:
        """Whether a weight has been written to."""
        return self._versions.moved()

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The operation of the inputs, whose first dimension calls may differ in."""
        call, self._num_calls = self._num_calls, self._num_calls + 1
        output: Tensor = _Call.apply(self._record, call, self._token, *inputs)  # type: ignore[no-untyped-call]
        return output


class _Uses:
    """The rows that an operation was made of and that the module asked for.

    An operation of all rows reads them before the module has written into the first. That it
    writes into one afterwards is an error, as where each step saves its own input.
    """

    def __init__(self, num_rows: int) -> None:
        self._used, self._modified = [False] * num_rows, [False] * num_rows

    def add(self, index: int) -> bool:
        """Whether this is the first use of a row."""
        is_first, self._used[index] = not self._used[index], True
        return is_first

    def close(self, source: Rows) -> None:
        """See what has become of the rows by the end of their steps."""
        for index, used in enumerate(self._used):
            self._modified[index] = used and not source.is_untouched(index)

    def check(self, grads: Sequence[Tensor | None]) -> None:
        """Raise as autograd does for a saved tensor, if a gradient needs one."""
        pairs = zip(self._modified, grads, strict=True)
        if any(modified and grad is not None for modified, grad in pairs):
            raise modified_in_place("inputs")


class _OfRows(torch.autograd.Function):
    """From an operation's result for all rows to a tensor for each of them.

    A row that was not used has no part in the gradient, whatever it holds: it may be no number.
    """

    @staticmethod
    def forward(
        ctx: Any,
        operation: Operation,
        uses: _Uses,
        versions: Versions,
        x: Tensor,
        result: Tensor,
        *_differentiable: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        ctx.operation, ctx.uses, ctx.versions, ctx.rescued = operation, uses, versions, None
        return tuple(cut(result))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        begin_backward()
        unused = [index for index, grad in enumerate(grads) if grad is None]
        needs, row_needs = ctx.needs_input_grad[5:7], ctx.needs_input_grad[7:]
        if len(unused) == len(grads):
            return (None,) * len(ctx.needs_input_grad)
        ctx.versions.check()
        (x,) = ctx.saved_tensors if ctx.rescued is None else (ctx.rescued,)
        if unused:
            # A gradient taken within a step may free the node, to which the others come later.
            ctx.rescued = x
            x = x.index_fill(0, torch.tensor(unused, device=x.device), 0)
        zeros = torch.zeros_like(next(grad for grad in grads if grad is not None))
        grad = torch.stack([zeros if grad is None else grad for grad in grads])
        row_grads: Gradients = (None,) * len(row_needs)
        if any(row_needs):
            (whole,) = ctx.operation.input_gradients(grad, (x,), (True,))
            pairs = zip(grads, whole.unbind(0), strict=True)
            row_grads = tuple(None if grad is None else row_grad for grad, row_grad in pairs)
        if needs[0]:
            ctx.uses.check(grads)
        weight_grads = ctx.operation.weight_gradients(grad, (x,), needs, (None, None))
        return (None,) * 5 + weight_grads + row_grads


class CallsOfRows:
    """An operation of all rows at once, whose result is given out row by row."""

    def __init__(self, candidate: Candidate, source: Rows) -> None:
        weight, bias = candidate.weight, candidate.bias
        operation, self._versions = candidate.operation(weight, bias), Versions(weight, bias)
        self._uses = _Uses(len(source.entries))
        with torch.no_grad():
            whole = operation.run(source.whole)
        if torch.is_grad_enabled():
            edges = (weight, bias, *source.differentiable())
            known = (operation, self._uses, self._versions, source.whole)
            entries = _OfRows.apply(*known, whole, *edges)  # type: ignore[no-untyped-call]
        else:
            entries = cut(whole)
        self._rows = Rows(whole, entries)

    def take(self, index: int) -> Row | None:
        """One row, to do with as the module likes; None from the second time on."""
        if self._versions.moved() or not self._uses.add(index):
            return None
        return Row(self._rows, index)

    def close(self, source: Rows) -> None:
        """The steps of the source are done."""
        self._uses.close(source)
        self._rows.close()
