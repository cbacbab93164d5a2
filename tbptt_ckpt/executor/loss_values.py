"""What a loss function may return: a scalar, or a pair of a sum and its weight."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.module.trees import keeps_more_than_its_values


def as_mean(value: Tensor, weight: float) -> tuple[Tensor, float, float]:
    """A mean over so many steps."""
    # torch's `mse_loss` takes the mean in place of the squares, which live on with it.
    if weight > 1 and keeps_more_than_its_values(value):
        return value * weight, weight, 1.0
    return value, weight, weight


def check_scalar(value: Tensor, what: str) -> None:
    """Raise `ArgumentError` for a tensor of other than one number."""
    if value.dim():
        raise ArgumentError(
            f"loss_fn returned {what} of shape {tuple(value.shape)}; return a scalar (the mean "
            "over the steps it was given), or a pair (loss_sum, weight)"
        )


def checked_pair(value: Any) -> tuple[Tensor, float | Tensor]:
    """`(loss_sum, weight)` as it was returned, or `ArgumentError`."""
    is_pair = isinstance(value, tuple | list) and len(value) == 2
    if not (
        is_pair and isinstance(value[0], Tensor) and isinstance(value[1], Tensor | int | float)
    ):
        raise ArgumentError(
            f"loss_fn returned {_described(value)}; return a scalar tensor (the mean over the "
            "steps it was given), or a pair (loss_sum, weight) of a tensor and a number"
        )
    total, weight = value
    check_scalar(total, "a loss_sum")
    if isinstance(weight, Tensor):
        check_scalar(weight, "a weight")
        if weight.requires_grad:
            raise ArgumentError(
                "loss_fn returned (loss_sum, weight) whose weight requires grad; detach it"
            )
        return total, weight
    return total, float(weight)


def _described(value: object) -> str:
    if not isinstance(value, tuple | list):
        return type(value).__name__
    if len(value) != 2:
        return f"a {type(value).__name__} of {len(value)}"
    return f"a pair of a loss_sum {type(value[0]).__name__} and a weight {type(value[1]).__name__}"
