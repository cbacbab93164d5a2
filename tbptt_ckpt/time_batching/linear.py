"""A linear map that leaves its weight gradient to the tap, and one over all rows at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tbptt_ckpt.time_batching.products import (
    add_sum,
    add_weight_gradient,
    multiply,
    multiply_back,
    weight_gradient,
)
from tbptt_ckpt.time_batching.taps import Versions, begin_backward, tap


class LinearRecord:
    """What the calls of one linear map in a leaf leave to the tap.

    Args:
        weight: [M, K].
        bias: [M], or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        self.versions = Versions(weight, bias)
        self.num_calls = 0
        self._notes: list[tuple[int, int, Tensor, Tensor]] = []

    def note(self, task: int, call: int, x: Tensor, grad: Tensor) -> None:
        """Leave one call's part to the tap."""
        self._notes.append((call, task, x, grad))

    def collect(
        self, whole: Tensor | None, needs: Sequence[bool], totals: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, ...]:
        """The gradients of weight and bias."""
        task = torch._C._current_graph_task_id()
        notes = sorted((n for n in self._notes if n[1] == task), key=lambda n: n[0])
        self._notes = []
        if not notes:
            return None, None, None
        grad = torch.cat([n[3] for n in notes])
        x = torch.cat([n[2] for n in notes]) if needs[1] else None
        notes.clear()
        return (
            None,
            None if x is None else add_weight_gradient(totals[0], grad, x),
            add_sum(totals[1], grad) if needs[2] else None,
        )


class _RecordedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, _token: Tensor, record: LinearRecord, call: int) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        ctx.record, ctx.call = record, call
        if x.dim() == 2:
            return multiply(x, record.weight, record.bias)
        flat = multiply(x.reshape(-1, x.shape[-1]), record.weight, record.bias)
        return flat.view(*x.shape[:-1], flat.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        if grad is None:
            return None, None, None, None
        task = begin_backward()
        (x,) = ctx.saved_tensors
        record: LinearRecord = ctx.record
        record.versions.check()
        flat = grad.reshape(-1, grad.shape[-1])
        record.note(task, ctx.call, x.reshape(-1, x.shape[-1]), flat)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        return multiply_back(flat, record.weight).view(x.shape), None, None, None


class TappedLinear:
    """One linear map of a leaf.

    Args:
        weight: [M, K].
        bias: [M], or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.record = LinearRecord(weight, bias)
        # Not in the record: the token's node holds that, and the two would hold each other.
        self.token = tap(self.record, None, weight, bias)

    def __call__(self, x: Tensor) -> Tensor:
        """The linear map of x: [..., K]."""
        call = self.record.num_calls
        self.record.num_calls = call + 1
        output: Tensor = _RecordedLinear.apply(x, self.token, self.record, call)  # type: ignore[no-untyped-call]
        return output


class _WholeLinear(torch.autograd.Function):
    """A linear map of the inputs of all steps, with the faster products."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(whole, weight)
        flat = multiply(whole.reshape(-1, whole.shape[-1]), weight, bias)
        return flat.view(*whole.shape[:-1], flat.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        begin_backward()
        whole, weight = ctx.saved_tensors
        grad = grads[0].reshape(-1, weight.shape[0])
        flat = whole.reshape(-1, whole.shape[-1])
        return (
            multiply_back(grad, weight).view(whole.shape) if ctx.needs_input_grad[0] else None,
            weight_gradient(grad, flat) if ctx.needs_input_grad[1] else None,
            grad.sum(0) if ctx.needs_input_grad[2] else None,
        )


def whole_linear(whole: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The linear map of whole: [n, ..., K] with one node for its gradient."""
    output: Tensor = _WholeLinear.apply(whole, weight, bias)  # type: ignore[no-untyped-call]
    return output
