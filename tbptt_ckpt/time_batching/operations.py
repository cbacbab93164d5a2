"""Operations with a weight whose gradient can be made once, over all calls of a leaf.

Each says how it runs, what the gradients of its inputs are in one call, and what those of its
weights are over the inputs of many calls, joined along their first dimension.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tbptt_ckpt.time_batching.products import (
    add_sum,
    add_weight_gradient,
    multiply,
    multiply_back,
    multiply_matrices,
)
from tbptt_ckpt.time_batching.taps import Gradients, Tensors

Needs = Sequence[bool]
_convolution_backward: Callable[..., Gradients] = torch.ops.aten.convolution_backward.default
_embedding_backward: Callable[..., Tensor] = torch.ops.aten.embedding_dense_backward.default


@dataclass(frozen=True)
class Operation(ABC):
    """An operation; weight and bias have no graph."""

    name: ClassVar[str]  # for the report
    weight: Tensor
    bias: Tensor | None

    @abstractmethod
    def run(self, *inputs: Tensor) -> Tensor:
        """The operation, without a graph."""

    @abstractmethod
    def input_gradients(self, grad: Tensor, inputs: Sequence[Tensor], needs: Needs) -> Gradients:
        """Gradients of one call's inputs."""

    def weight_gradient(self, grad: Tensor, total: Tensor | None, *inputs: Tensor) -> Tensor | None:
        """The weight's gradient over many calls; None where it was added to a total."""
        raise NotImplementedError

    def weight_gradients(
        self, grad: Tensor, inputs: Sequence[Tensor], needs: Needs, totals: Tensors
    ) -> Gradients:
        """Gradients of weight and bias over many calls, as `Record.collect` gives them."""
        weight = self.weight_gradient(grad, totals[0], *inputs) if needs[0] else None
        return weight, add_sum(totals[1], _flat(grad)) if needs[1] else None


class Linear(Operation):
    """`x @ weight.T + bias` for x: [..., K], weight: [M, K]."""

    name = "linear"

    def run(self, *inputs: Tensor) -> Tensor:
        """[..., M]."""
        (x,) = inputs
        product = multiply(_flat(x), self.weight, self.bias)
        return product if x.dim() == 2 else product.view(*x.shape[:-1], product.shape[-1])

    def input_gradients(self, grad: Tensor, inputs: Sequence[Tensor], needs: Needs) -> Gradients:
        """[..., K]."""
        if not needs[0]:
            return (None,)
        product = multiply_back(_flat(grad), self.weight)
        return (product if grad.dim() == 2 else product.view(inputs[0].shape),)

    def weight_gradient(self, grad: Tensor, total: Tensor | None, *inputs: Tensor) -> Tensor | None:
        """[M, K]."""
        return add_weight_gradient(total, _flat(grad), _flat(inputs[0]))


class Product(Operation):
    """`x @ weight + bias` for x: [N, K], weight: [K, M]."""

    name = "matmul"

    def run(self, *inputs: Tensor) -> Tensor:
        """[N, M]."""
        product = multiply_back(inputs[0], self.weight)
        return product if self.bias is None else product.add_(self.bias)

    def input_gradients(self, grad: Tensor, inputs: Sequence[Tensor], needs: Needs) -> Gradients:
        """[N, K]."""
        return (multiply(grad, self.weight) if needs[0] else None,)

    def weight_gradient(self, grad: Tensor, total: Tensor | None, *inputs: Tensor) -> Tensor | None:
        """[K, M]."""
        return add_weight_gradient(total, inputs[0], grad)


@dataclass(frozen=True)
class Embedding(Operation):
    """Rows of weight: [V, E]; inputs are indices of any one shape [N, ...]."""

    name = "embedding"
    padding_idx: int

    def run(self, *inputs: Tensor) -> Tensor:
        """[N, ..., E]."""
        return torch.embedding(self.weight, inputs[0], self.padding_idx, False, False)

    def input_gradients(self, grad: Tensor, inputs: Sequence[Tensor], needs: Needs) -> Gradients:
        """Indices have none."""
        return (None,)

    def weight_gradient(self, grad: Tensor, total: Tensor | None, *inputs: Tensor) -> Tensor | None:
        """[V, E]."""
        return _embedding_backward(grad, *inputs, len(self.weight), self.padding_idx, False)


class Bilinear(Operation):
    """`x1 @ weight[o] @ x2 + bias[o]` for x1: [N, I], x2: [N, J], weight: [O, I, J]."""

    name = "bilinear"

    def run(self, *inputs: Tensor) -> Tensor:
        """[N, O]."""
        x1, x2 = inputs
        return torch.bilinear(x1, x2, self.weight, self.bias)

    def input_gradients(self, grad: Tensor, inputs: Sequence[Tensor], needs: Needs) -> Gradients:
        """[N, I] and [N, J]."""
        x1, x2 = inputs
        return (
            torch.einsum("no,oij,nj->ni", grad, self.weight, x2) if needs[0] else None,
            torch.einsum("no,oij,ni->nj", grad, self.weight, x1) if needs[1] else None,
        )

    def weight_gradient(self, grad: Tensor, total: Tensor | None, *inputs: Tensor) -> Tensor | None:
        """[O, I, J]."""
        x1, x2 = inputs
        weight = torch.empty_like(self.weight)
        for output, column in enumerate(grad.unbind(1)):
            multiply_matrices((x1 * column[:, None]).t(), x2, out=weight[output])
        return weight


@dataclass(frozen=True)
class Convolution(Operation):
    """A convolution of x: [N, C, ...], with the options of `torch.convolution`."""

    options: tuple[Any, ...]

    def run(self, *inputs: Tensor) -> Tensor:
        """[N, M, ...]."""
        return torch.convolution(inputs[0], self.weight, self.bias, *self.options)

    def input_gradients(self, grad: Tensor, inputs: Sequence[Tensor], needs: Needs) -> Gradients:
        """[N, C, ...]."""
        return self._backward(grad, inputs, (True, False, False))[:1] if needs[0] else (None,)

    def weight_gradients(
        self, grad: Tensor, inputs: Sequence[Tensor], needs: Needs, totals: Tensors
    ) -> Gradients:
        """Both by one kernel."""
        return self._backward(grad, inputs, (False, needs[0], needs[1]))[1:]

    def _backward(self, grad: Tensor, inputs: Sequence[Tensor], mask: Needs) -> Gradients:
        sizes = [self.weight.shape[0]]
        return _convolution_backward(grad, *inputs, self.weight, sizes, *self.options, mask)


class Convolution1d(Convolution):
    """Of x: [N, C, W]."""

    name = "conv1d"


class Convolution2d(Convolution):
    """Of x: [N, C, H, W]."""

    name = "conv2d"


def _flat(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])
