"""What can be told of a weight from looking at it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is of the plain type."""
    return type(tensor) is Tensor or type(tensor) is nn.Parameter


def transposed_weight(weight: Tensor) -> Tensor | None:
    """The weight whose transpose this is, if it is one."""
    base = weight._base
    if base is None or not is_stable(base) or base.dim() != 2:
        return None
    swapped = (base.stride(1), base.stride(0)) == weight.stride()
    alike = weight.shape == (base.shape[1], base.shape[0]) and swapped
    return base if alike and base.data_ptr() == weight.data_ptr() else None


def is_stable(weight: Tensor) -> bool:
    """Whether a weight cannot have been computed within the step."""
    kind = type(weight)
    if weight.layout is not torch.strided or weight.is_inference():
        return False
    if kind is nn.Parameter:
        return True
    return kind is Tensor and weight.requires_grad and weight.is_leaf
