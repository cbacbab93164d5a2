"""A scalar loss of a segment that is no mean over its steps is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import lstm, random_data
from torch import Tensor

from tbptt_ckpt import TBPTT, ArgumentError, TensorSequence


def masked(y: Tensor, target: Tensor) -> Tensor:
    mask = (target > 0).to(y.dtype)
    return ((y - target).square() * mask).sum() / mask.sum()


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda y, t: (y - t).square().sum(),
        lambda y, t: 0.5 * F.mse_loss(y, t, reduction="sum"),
        masked,
        lambda y, t: F.mse_loss(y, t) + (y[1:] - y[:-1]).square().sum(),
    ],
)
@pytest.mark.parametrize("strategy", ["retain", "uniform:5"])
def test_what_is_no_mean_is_refused_before_an_update(strategy: str, loss_fn: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^loss_fn gave .* return \(loss_sum, weight\)"):
        TBPTT(lstm(), loss_fn, 10, 10, strategy=strategy).train(TensorSequence(*random_data(20)))


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda y, t: 0.5 * F.mse_loss(y, t),
        lambda y, t: (y * t).mean(),  # signed
        lambda y, t: F.mse_loss(y, t) + 1e-3 * y.abs().mean(),
        lambda y, t: (y * 0.0).mean(),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_means_pass(dtype: torch.dtype, loss_fn: Any) -> None:
    inputs, targets = (data.to(dtype) for data in random_data(400))
    module = lstm().to(dtype)
    TBPTT(module, loss_fn, 10, 10, strategy="uniform:5").train(TensorSequence(inputs, targets))


def test_rounding_of_a_mean_near_zero_is_no_difference() -> None:
    def loss_fn(y: Tensor, target: Tensor) -> Tensor:
        big = 1e4 * torch.sign(target)
        return (big + y - 1e4 * torch.sign(target)).mean()

    inputs, targets = (data.float() for data in random_data(100))
    TBPTT(lstm().float(), loss_fn, 20, 20, strategy="uniform:5").train(
        TensorSequence(inputs, targets)
    )
