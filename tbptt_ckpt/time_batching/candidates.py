"""Which operations may be batched: with which weights, and which tensors beside them.

NOTE [What is proved for an operation]
The weight is a leaf tensor of the plain type that learns, or an `nn.Parameter`: it cannot
have been computed in the step. Its version is looked at in every call. An input counts as a
row of the segment's inputs if it is the very tensor that the step was given and nobody wrote
into it. Whatever else comes is left to the plain operation.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tbptt_ckpt.time_batching.operations import Operation

COMPUTED = "a weight that is computed in the step"


def is_plain(tensor: Any) -> bool:
    """Whether a tensor is of the plain type."""
    return type(tensor) is Tensor or type(tensor) is nn.Parameter


def is_stable(weight: Tensor | None) -> bool:
    """Whether a weight cannot have been computed within the step."""
    if weight is None:
        return True
    kind = type(weight)
    if weight.layout is not torch.strided or weight.is_inference():
        return False
    return kind is nn.Parameter or (kind is Tensor and weight.requires_grad and weight.is_leaf)


def transposed_weight(weight: Tensor) -> Tensor | None:
    """The weight whose transpose this is, if it is one."""
    base = weight._base
    if base is None or not is_stable(base) or base.dim() != 2:
        return None
    swapped = (base.stride(1), base.stride(0)) == weight.stride()
    alike = weight.shape == (base.shape[1], base.shape[0]) and swapped
    return base if alike and base.data_ptr() == weight.data_ptr() else None


class Candidate(NamedTuple):
    """An operation that may be batched.

    Attributes:
        name: For the report.
        make: Makes the operation of a weight and bias without a graph.
        weight: Its weight.
        bias: Its bias, or None.
        options: What else tells it from others of the same weight.
        cast: To what autocast casts weight, bias and inputs.
    """

    name: str
    make: Callable[[Tensor, Tensor | None], Operation]
    weight: Tensor
    bias: Tensor | None = None
    options: Hashable = ()
    cast: torch.dtype | None = None

    @property
    def key(self) -> Hashable:
        """The same for the same operation, as long as somebody holds its weights."""
        return self.name, id(self.weight), id(self.bias), self.options, self.cast

    def reason_to_leave(self, inputs: Sequence[Any]) -> str:
        """Why it is left to the plain operation; empty if it is not."""
        weight, bias, cast = self.weight, self.bias, self.cast
        if not is_stable(weight) or not is_stable(bias):
            return COMPUTED
        if weight.is_complex():
            return "complex numbers"
        allowed = (weight.dtype,) if cast is None else (torch.float32, cast)
        for x in inputs:
            if not is_plain(x) or not x.dim():
                return "inputs of another type, or without a dimension"
            if x.dtype not in allowed and (x.is_floating_point() or x.is_complex()):
                return "dtypes that differ"
        if cast is not None and any(
            w is not None and w.dtype not in allowed for w in (weight, bias)
        ):
            return "dtypes that autocast leaves alone"
        return ""

    def tapped(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias, cast if autocast does so: once per leaf, and back once, too."""
        if self.cast is None:
            return self.weight, self.bias
        return self.weight.to(self.cast), None if self.bias is None else self.bias.to(self.cast)

    def operation(self, weight: Tensor, bias: Tensor | None) -> Operation:
        """The operation with these weights."""
        return self.make(weight.detach(), None if bias is None else bias.detach())
