"""Sums of products in a graph are one product each, and the same numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from tbptt_ckpt.time_batching.joined_sums import join_sums

STEPS, LANES, WIDTH = 5, 2, 3
PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def linear(weight: Tensor, bias: Tensor, x: Tensor, h: Tensor) -> Tensor:
    for one in x:
        h = torch.tanh(F.linear(h, weight, bias) + one)
    return h


def transposed(weight: Tensor, bias: Tensor, x: Tensor, h: Tensor) -> Tensor:
    for one in x:
        h = torch.tanh(h @ weight + one)
    return h


def twice(weight: Tensor, bias: Tensor, x: Tensor, h: Tensor) -> Tensor:
    """In both orientations in each step, and in a penalty."""
    for one in x:
        h = torch.tanh(F.linear(torch.tanh(h @ weight), weight, bias) + one)
    return h + (weight * weight).sum() + bias


def of_other_lanes(weight: Tensor, bias: Tensor, x: Tensor, h: Tensor) -> Tensor:
    for count, one in enumerate(x):
        h = torch.tanh(F.linear(h, weight, bias) + one)
        h = h + F.linear(h[: 1 + count % 2], weight).sum(0)
    return h


def once(weight: Tensor, bias: Tensor, x: Tensor, h: Tensor) -> Tensor:
    return torch.tanh(F.linear(h, weight, bias)) * x.sum()


def doubled(weight: Tensor, bias: Tensor, x: Tensor, h: Tensor) -> Tensor:
    """The same products added to themselves."""
    gram = weight.t() @ weight
    return linear(gram + gram, bias + bias, x, h)


# With the numbers of products that are left: recurrent ones forward and back, and one a weight.
FUNCTIONS: dict[Callable[..., Tensor], int] = {
    linear: 2 * STEPS + 1,
    transposed: 2 * STEPS + 1,
    twice: 4 * STEPS + 1,
    of_other_lanes: 4 * STEPS + 1,
    once: 3,
}


def gradients(function: Callable[..., Tensor], *given: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in given]
    value = function(*leaves).square().sum()
    return [*torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)]


def made(function: Callable[..., Tensor], *given: Tensor) -> torch.fx.GraphModule:
    def of_it(*tensors: Tensor) -> Any:
        return gradients(function, *tensors)

    return make_fx(of_it, tracing_mode="fake")(*given)


@pytest.mark.parametrize("function", [*FUNCTIONS, doubled])
def test_sums_of_products_are_one_product(function: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    shapes = (WIDTH, WIDTH), (WIDTH,), (STEPS, LANES, WIDTH), (LANES, WIDTH)
    given = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    graph = made(function, *given)
    join_sums(graph.graph)
    graph.recompile()
    for expected, got in zip(gradients(function, *given), graph(*given), strict=True):
        assert float((expected - got).abs().max()) <= 1e-12 * (1 + float(expected.abs().max()))
    if function in FUNCTIONS:
        products = [node for node in graph.graph.nodes if node.target in PRODUCTS]
        assert len(products) == FUNCTIONS[function]
