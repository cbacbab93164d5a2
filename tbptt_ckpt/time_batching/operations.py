"""Further operations with a weight whose gradient can be made once, over all calls of a leaf.

Each says how it runs, what the gradients of its inputs are in one call, and what those of its
weights are over the inputs of many calls, joined along their first dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tbptt_ckpt.time_batching.products import (
    add_sum,
    add_weight_gradient,
    multiply,
    multiply_back,
    multiply_matrices,
)
from tbptt_ckpt.time_batching.taps import Versions, begin_backward, tap

Gradients = tuple[Tensor | None, ...]
_convolution_backward: Callable[..., Gradients] = torch.ops.aten.convolution_backward.default
_embedding_backward: Callable[..., Tensor] = torch.ops.aten.embedding_dense_backward.default


class Operation(Protocol):
    """An operation with a weight and perhaps a bias."""

    def run(self, *inputs: Tensor) -> Tensor:
        """The operation, without a graph."""
        ...

    def input_gradients(
        self, grad: Tensor, inputs: Sequence[Tensor], needs: Sequence[bool]
    ) -> Gradients:
        """Gradients of one call's inputs."""
        ...

    def weight_gradients(
        self,
        grad: Tensor,
        inputs: Sequence[Tensor],
        needs: Sequence[bool],
        totals: Sequence[Tensor | None],
    ) -> Gradients:
        """Gradients of weight and bias over many calls; see `Record.collect`."""
        ...


class OperationRecord:
    """What the calls of one operation in a leaf leave to the tap."""

    def __init__(self, operation: Operation, *weights: Tensor | None) -> None:
        self.operation, self.versions, self.num_calls = operation, Versions(*weights), 0
        self._notes: list[tuple[int, int, Tensor, Sequence[Tensor]]] = []

    def note(self, task: int, call: int, grad: Tensor, inputs: Sequence[Tensor]) -> None:
        """Leave one call's part to the tap."""
        self._notes.append((call, task, grad, inputs))

    def collect(
        self, whole: Tensor | None, needs: Sequence[bool], totals: Sequence[Tensor | None]
    ) -> Gradients:
        """The gradients of weight and bias."""
        task = torch._C._current_graph_task_id()
        notes = sorted((n for n in self._notes if n[1] == task), key=lambda n: n[0])
        self._notes = []
        if not notes:
            return None, None, None
        grad = torch.cat([n[2] for n in notes])
        inputs = [torch.cat(parts) for parts in zip(*(n[3] for n in notes), strict=True)]
        notes.clear()
        return None, *self.operation.weight_gradients(grad, inputs, needs[1:], totals)


class _Recorded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, record: OperationRecord, call: int, _token: Tensor, *inputs: Tensor
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        ctx.record, ctx.call = record, call
        return record.operation.run(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        inputs = ctx.saved_tensors
        if grad is None:
            return (None,) * (3 + len(inputs))
        task = begin_backward()
        record: OperationRecord = ctx.record
        record.versions.check()
        record.note(task, ctx.call, grad, inputs)
        needs = ctx.needs_input_grad[3:]
        return None, None, None, *record.operation.input_gradients(grad, inputs, needs)


class TappedOperation:
    """One operation of a leaf.

    Args:
        operation: What it does.
        weight: Its weight.
        bias: Its bias, or None.
    """

    def __init__(self, operation: Operation, weight: Tensor, bias: Tensor | None) -> None:
        self.record = OperationRecord(operation, weight, bias)
        # Not in the record: the token's node holds that, and the two would hold each other.
        self.token = tap(self.record, None, weight, bias)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The operation of the inputs, whose first dimension calls may differ in."""
        call, self.record.num_calls = self.record.num_calls, self.record.num_calls + 1
        output: Tensor = _Recorded.apply(self.record, call, self.token, *inputs)  # type: ignore[no-untyped-call]
        return output


@dataclass(frozen=True)
class Product:
    """`x @ weight + bias` for x: [N, K], weight: [K, M]."""

    weight: Tensor
    bias: Tensor | None

    def run(self, *inputs: Tensor) -> Tensor:
        """See `Operation`."""
        product = multiply_back(inputs[0], self.weight)
        return product if self.bias is None else product.add_(self.bias)

    def input_gradients(
        self, grad: Tensor, inputs: Sequence[Tensor], needs: Sequence[bool]
    ) -> Gradients:
        """See `Operation`."""
        return (multiply(grad, self.weight) if needs[0] else None,)

    def weight_gradients(
        self,
        grad: Tensor,
        inputs: Sequence[Tensor],
        needs: Sequence[bool],
        totals: Sequence[Tensor | None],
    ) -> Gradients:
        """See `Operation`."""
        weight = add_weight_gradient(totals[0], inputs[0], grad) if needs[0] else None
        return weight, add_sum(totals[1], grad) if needs[1] else None


@dataclass(frozen=True)
class Embedding:
    """Rows of weight: [V, E]; inputs are indices of any one shape [N, ...]."""

    weight: Tensor
    padding_idx: int

    def run(self, *inputs: Tensor) -> Tensor:
        """See `Operation`."""
        return torch.embedding(self.weight, inputs[0], self.padding_idx, False, False)

    def input_gradients(
        self, grad: Tensor, inputs: Sequence[Tensor], needs: Sequence[bool]
    ) -> Gradients:
        """See `Operation`."""
        return (None,)

    def weight_gradients(
        self,
        grad: Tensor,
        inputs: Sequence[Tensor],
        needs: Sequence[bool],
        totals: Sequence[Tensor | None],
    ) -> Gradients:
        """See `Operation`."""
        rows = self.weight.shape[0]
        return _embedding_backward(grad, inputs[0], rows, self.padding_idx, False), None


@dataclass(frozen=True)
class Bilinear:
    """`x1 @ weight[o] @ x2 + bias[o]` for x1: [N, I], x2: [N, J], weight: [O, I, J]."""

    weight: Tensor
    bias: Tensor | None

    def run(self, *inputs: Tensor) -> Tensor:
        """See `Operation`."""
        x1, x2 = inputs
        return torch.bilinear(x1, x2, self.weight, self.bias)

    def input_gradients(
        self, grad: Tensor, inputs: Sequence[Tensor], needs: Sequence[bool]
    ) -> Gradients:
        """See `Operation`."""
        x1, x2 = inputs
        return (
            torch.einsum("no,oij,nj->ni", grad, self.weight, x2) if needs[0] else None,
            torch.einsum("no,oij,ni->nj", grad, self.weight, x1) if needs[1] else None,
        )

    def weight_gradients(
        self,
        grad: Tensor,
        inputs: Sequence[Tensor],
        needs: Sequence[bool],
        totals: Sequence[Tensor | None],
    ) -> Gradients:
        """See `Operation`."""
        x1, x2 = inputs
        weight = None
        if needs[0]:
            weight = torch.empty_like(self.weight)
            for output, column in enumerate(grad.unbind(1)):
                multiply_matrices((x1 * column[:, None]).t(), x2, out=weight[output])
        return weight, add_sum(totals[1], grad) if needs[1] else None


@dataclass(frozen=True)
class Convolution:
    """`conv1d` or `conv2d` of x: [N, C, ...]."""

    weight: Tensor
    bias: Tensor | None
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int

    def run(self, *inputs: Tensor) -> Tensor:
        """See `Operation`."""
        zeros = [0] * len(self.stride)
        return torch.convolution(
            inputs[0],
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            False,
            zeros,
            self.groups,
        )

    def input_gradients(
        self, grad: Tensor, inputs: Sequence[Tensor], needs: Sequence[bool]
    ) -> Gradients:
        """See `Operation`."""
        if not needs[0]:
            return (None,)
        return (self._backward(grad, inputs[0], (True, False, False))[0],)

    def weight_gradients(
        self,
        grad: Tensor,
        inputs: Sequence[Tensor],
        needs: Sequence[bool],
        totals: Sequence[Tensor | None],
    ) -> Gradients:
        """See `Operation`."""
        return self._backward(grad, inputs[0], (False, needs[0], needs[1]))[1:]

    def _backward(self, grad: Tensor, x: Tensor, mask: tuple[bool, bool, bool]) -> Gradients:
        return _convolution_backward(
            grad,
            x,
            self.weight,
            [self.weight.shape[0]],
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0] * len(self.stride),
            self.groups,
            mask,
        )
