"""Matrix products with a weight, by the faster of the kernels that torch brings along.

NOTE [Two kernels]
For float32 on a CPU torch's own `addmm` calls MKL, and oneDNN is reached only through the
operator that the compiler emits for a linear layer. On processors with AVX-512 the latter is
up to 2.7 times as fast at the shapes of a recurrent step and twice as fast at those of a whole
segment, and slower at small ones (`docs/time_batching.md` has the table). The choice depends
on shapes alone, so that equal runs have equal bits. Where the operator is missing, `addmm`
does everything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Bound here: while a region is open, torch's names lead to it.
multiply_matrices, _addmm = torch.mm, torch.addmm

# Where oneDNN begins to win, measured: multiply-adds, and elements of the weight.
_FORWARD_WORK, _FORWARD_ELEMENTS = 4_000_000, 1_000_000
_BACKWARD_WORK, _BACKWARD_ROWS = 1_000_000, 4
_WEIGHT_WORK = 4_000_000
# A weight gradient that is added to a total is made in blocks of rows of about this size.
_BLOCK_ELEMENTS = 262_144


def _find_onednn() -> Callable[..., Tensor] | None:
    """The operator `(x, weight, bias, "none", [], "") -> x @ weight.T + bias`, if it works here."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    if not wide or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    try:
        operator: Any = torch.ops.mkldnn._linear_pointwise.default
        x, weight = torch.ones(2, 3, device="cpu"), torch.ones(4, 3, device="cpu")
        works = torch.equal(operator(x, weight, None, "none", [], ""), x @ weight.t())
    except (AttributeError, RuntimeError, TypeError):
        return None
    return operator if works else None


_onednn = _find_onednn()


def _onednn_for(x: Tensor) -> Callable[..., Tensor] | None:
    """The operator, for products that are large enough."""
    return _onednn if x.dtype == torch.float32 and x.is_cpu else None


def _forward_onednn(x: Tensor, weight: Tensor) -> Callable[..., Tensor] | None:
    elements = weight.numel()
    large = elements >= _FORWARD_ELEMENTS or x.shape[0] * elements >= _FORWARD_WORK
    return _onednn_for(x) if large else None


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` for x: [N, K], weight: [M, K]."""
    onednn = _forward_onednn(x, weight)
    if onednn is not None:
        return onednn(x, weight, bias, "none", [], "")
    if bias is None:
        return multiply_matrices(x, weight.t())
    return _addmm(bias, x, weight.t())


def add_product(total: Tensor, x: Tensor, weight: Tensor) -> None:
    """`total += x @ weight.T` in place."""
    onednn = _forward_onednn(x, weight)
    if onednn is None:
        total.addmm_(x, weight.t())
    else:
        total.add_(onednn(x, weight, None, "none", [], ""))


def write_product(total: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """`total = x @ weight.T + bias` in place."""
    onednn = _forward_onednn(x, weight)
    if onednn is not None:
        total.copy_(onednn(x, weight, bias, "none", [], ""))
    elif bias is None:
        multiply_matrices(x, weight.t(), out=total)
    else:
        _addmm(bias, x, weight.t(), out=total)


def multiply_back(grad: Tensor, weight: Tensor) -> Tensor:
    """`grad @ weight` for grad: [N, M], weight: [M, K]."""
    rows = grad.shape[0]
    large = rows >= _BACKWARD_ROWS and rows * weight.numel() >= _BACKWARD_WORK
    onednn = _onednn_for(grad) if large else None
    if onednn is None:
        return multiply_matrices(grad, weight)
    return onednn(grad, weight.t(), None, "none", [], "")


def add_weight_gradient(total: Tensor | None, grad: Tensor, x: Tensor) -> Tensor | None:
    """Add `grad.T @ x`, the sum over all rows, to a total, if there is one; else give it back.

    For grad: [N, M], x: [N, K], of which N counts over time, too.
    """
    large = grad.numel() * x.shape[1] >= _WEIGHT_WORK
    onednn = _onednn_for(grad) if large else None
    if total is None:
        if onednn is None:
            return multiply_matrices(grad.t(), x)
        return onednn(grad.t(), x.t(), None, "none", [], "")
    if onednn is None:
        total.addmm_(grad.t(), x)
        return None
    transposed = x.t().contiguous()
    step = max(1, _BLOCK_ELEMENTS // x.shape[1])
    for begin in range(0, grad.shape[1], step):
        part = grad[:, begin : begin + step].t()
        total[begin : begin + step].add_(onednn(part, transposed, None, "none", [], ""))
    return None


def add_sum(total: Tensor | None, grad: Tensor) -> Tensor | None:
    """Add the sum over the rows to a total, if there is one to add to; else give it back."""
    if total is None:
        return grad.sum(0)
    total.add_(grad.sum(0))
    return None
