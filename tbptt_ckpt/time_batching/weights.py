"""Which weights, and which tensors beside them, an operation may be batched with.

NOTE [What is proved for an operation]
The weight is a leaf tensor of the plain type that learns, or an `nn.Parameter`: it cannot
have been computed in the step. Its version is looked at in every call. An input counts as a
row of the segment's inputs if it is the very tensor that the step was given and nobody wrote
into it. Whatever else comes is left to the plain operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

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


def reason_to_leave(
    inputs: Sequence[Any], weight: Tensor, bias: Tensor | None, cast: torch.dtype | None = None
) -> str:
    """Why an operation is left to the plain one; empty if it is not.

    Args:
        inputs: Its inputs.
        weight: Its weight.
        bias: Its bias, or None.
        cast: What autocast makes of all of them.
    """
    if not is_stable(weight) or not is_stable(bias):
        return COMPUTED
    if not all(is_plain(x) and x.dim() for x in inputs):
        return "inputs of another type, or without a dimension"
    if weight.is_complex():
        return "complex numbers"
    dtypes = {x.dtype for x in inputs if x.is_floating_point() or x.is_complex()}
    if cast is None:
        return "" if dtypes <= {weight.dtype} else "dtypes that differ"
    dtypes.update(w.dtype for w in (weight, bias) if w is not None)
    return "" if dtypes <= {torch.float32, cast} else "dtypes that autocast leaves alone"
