"""Which operations may be batched: with which weights, and which tensors beside them.

NOTE [What is proved for an operation]
The weight is a leaf tensor of the plain type that learns, or an `nn.Parameter`: it cannot
have been computed in the step. Its version is looked at in every call. An input counts as a
row of the segment's inputs if it is the very tensor that the step was given and nobody wrote
into it. Whatever else comes is left to the plain operation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tbptt_ckpt.time_batching.operations import Operation

# Why calls are left to the plain operation, the second of these under "auto".
COMPUTED = "a weight that is computed in the step"
SMALL = "too small to pay"
CHANGED = "a weight that changed within the segment"
COMPLEX, DTYPES, SHAPES = "complex numbers", "dtypes that differ", "shapes that differ"
TYPES = "inputs of another type, or without a dimension"
# How often an operation with a weight of a shape was batched, or for which reason it was left.
Tally = Counter[tuple[str, tuple[int, ...], str]]


def is_plain(tensor: Any) -> bool:
    """Whether a tensor is of the plain type."""
    return type(tensor) is Tensor or type(tensor) is nn.Parameter


def is_stable(weight: Tensor | None) -> bool:
    """Whether a weight cannot have been computed within the step."""
    if weight is None:
        return True
    if not is_plain(weight) or weight.layout is not torch.strided or weight.is_inference():
        return False
    return type(weight) is nn.Parameter or (weight.requires_grad and weight.is_leaf)


def transposed_weight(weight: Tensor) -> Tensor | None:
    """The weight whose transpose this is, if it is one."""
    base = weight._base
    if base is None or not is_stable(base) or base.dim() != 2:
        return None
    swapped = (base.stride(1), base.stride(0)) == weight.stride()
    alike = weight.shape == (base.shape[1], base.shape[0]) and swapped
    return base if alike and base.data_ptr() == weight.data_ptr() else None


def autocast_dtype(weight: Tensor) -> torch.dtype | None:
    """To what autocast casts a product with a weight; None where it is off."""
    if not torch._C._is_any_autocast_enabled() or not is_plain(weight):
        return None
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


@dataclass(eq=False)
class Candidate:
    """An operation of a run that may be batched: all calls with the same weights and options.

    `cast` is to what autocast casts weight, bias and inputs.
    """

    kind: type[Operation]
    weight: Tensor
    bias: Tensor | None
    options: tuple[Any, ...]
    cast: torch.dtype | None

    @cached_property
    def _allowed(self) -> tuple[torch.dtype, ...]:
        return (self.weight.dtype,) if self.cast is None else (torch.float32, self.cast)

    def reason_to_leave(self, smallest: int) -> str:
        """Why no call is batched, whatever its inputs are; empty where some may be."""
        weights = [w for w in (self.weight, self.bias) if w is not None]
        if not all(map(is_stable, weights)):
            return COMPUTED
        if self.weight.is_complex():
            return COMPLEX
        if self.cast is not None and any(w.dtype not in self._allowed for w in weights):
            return "dtypes that autocast leaves alone"
        return SMALL if self.weight.numel() < smallest else ""

    def misfit(self, inputs: Sequence[Any]) -> str:
        """Why a call with these inputs is not batched; empty if it may be."""
        for x in inputs:
            if not is_plain(x) or not x.dim():
                return TYPES
            if x.dtype not in self._allowed and (x.is_floating_point() or x.is_complex()):
                return DTYPES
        return ""

    def tapped(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias, cast if autocast does so: once per leaf, and back once, too."""
        if self.cast is None:
            return self.weight, self.bias
        return self.weight.to(self.cast), None if self.bias is None else self.bias.to(self.cast)

    def operation(self, weight: Tensor, bias: Tensor | None) -> Operation:
        """The operation with these weights."""
        return self.kind(weight.detach(), None if bias is None else bias.detach(), *self.options)
