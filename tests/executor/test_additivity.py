"""A scalar loss of a segment that is no mean over its steps is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import lstm, random_data
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tbptt_ckpt import TBPTT, ArgumentError, TensorSequence
from tbptt_ckpt.executor.additivity import MeanCheck


def masked(y: Tensor, target: Tensor) -> Tensor:
    mask = (target > 0).to(y.dtype)
    return ((y - target).square() * mask).sum() / mask.sum()


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda y, t: (y - t).square().sum(),
        lambda y, t: 0.5 * F.mse_loss(y, t, reduction="sum"),
        masked,
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
    inputs, targets = (data.to(dtype) for data in random_data(200))
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


def rough(lag: int) -> Any:
    """The mean of differences over so many steps, beside the error."""

    def loss_fn(y: Tensor, target: Tensor) -> Tensor:
        moved = (y[lag:] - y[:-lag]).square().mean() if len(y) > lag else y.sum() * 0
        return F.mse_loss(y, target) + moved

    return loss_fn


def discounted(y: Tensor, target: Tensor) -> Tensor:
    places = torch.arange(len(y), dtype=y.dtype).reshape(-1, 1, 1)
    return ((y - target).square() * 0.9**places).mean()


def differences(y: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss((y[1:] - y[:-1]).square(), (target[1:] - target[:-1]).square()) + y.mean()


@pytest.mark.parametrize("loss_fn", [rough(1), rough(2), rough(7), discounted, differences])
def test_what_couples_steps_is_told_apart_and_right_as_one_leaf(loss_fn: Any) -> None:
    data = TensorSequence(*random_data(40))
    with pytest.raises(
        ArgumentError, match=r"it couples neighbouring steps.*module's output.*retain"
    ):
        TBPTT(lstm(), loss_fn, 20, 20, strategy="uniform:10").train(data)
    module, expected = lstm(), lstm()
    TBPTT(module, loss_fn, 40, 40, strategy="retain").train(data)
    loss_fn(expected(data.inputs)[0], data.targets).backward()
    for found, by_hand in zip(module.parameters(), expected.parameters(), strict=True):
        assert found.grad is not None
        assert torch.allclose(found.grad, by_hand.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("num_steps", [2, 3])
def test_few_steps_tell_a_coupling_too(num_steps: int) -> None:
    tbptt = TBPTT(lstm(), rough(1), 12, 12, strategy=f"uniform:{num_steps}")
    with pytest.raises(ArgumentError, match="couples neighbouring steps"):
        tbptt.train(TensorSequence(*random_data(24)))


def leaving_out(mark: float) -> Any:
    def loss_fn(y: Tensor, target: Tensor) -> Tensor:
        kept = target == target if mark != mark else target != mark
        return ((y - torch.where(kept, target, 0)).square() * kept).sum() / kept.sum()

    return loss_fn


@pytest.mark.parametrize("mark", [0.0, -1.0, -100.0, float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mask_that_begins_in_a_late_window_is_seen_there(dtype: torch.dtype, mark: float) -> None:
    inputs, targets = (data.to(dtype) for data in random_data(400))
    targets[317, 0, 0] = mark
    tbptt = TBPTT(lstm().to(dtype), leaving_out(mark), 20, 20, strategy="uniform:10")
    windows = []
    with pytest.raises(ArgumentError, match=r"for 2 steps .* return \(loss_sum, weight\)"):
        windows.extend(tbptt.windows(TensorSequence(inputs, targets)))
    assert len(windows) == 15


class Counted(TorchFunctionMode):
    calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func is torch.count_nonzero
        return func(*args, **(kwargs or {}))


def test_what_marks_nothing_is_counted_no_more() -> None:
    check = MeanCheck(lambda y, t: (y - t).square().mean())
    targets = torch.zeros(6, 2)
    targets[3:] = 1.0
    check.check((torch.randn(6, 2), targets), 6, 0)
    with Counted() as counted:
        check.begin([targets], 6)
        check.check((torch.randn(6, 2), targets), 6, 0)
    assert counted.calls == 3  # of -1, -100 and NaN, once for the window


def test_the_time_it_takes_is_a_small_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which a call of the loss takes a second, and a window ten."""
    seconds, asked = [0.0], []

    def loss_fn(y: Tensor, target: Tensor) -> Tensor:
        asked.append(len(y))
        seconds[0] += 1.0
        return (y - target).square().mean()

    monkeypatch.setattr("time.perf_counter", lambda: seconds[0])
    check = MeanCheck(loss_fn)
    y, target = torch.randn(64, 2), torch.ones(64, 2)
    for _ in range(1000):
        check.begin([target], 64)
        check.check((y, target), 64, 0)
        seconds[0] += 10.0
    assert 3 * 8 < len(asked) < 3 * (8 + 0.005 * seconds[0] / 3 + 1)
    assert {3, 64} < set(asked)
    assert any(one != rest for one, rest in zip(asked[1::3], asked[2::3], strict=True))


def test_a_loss_that_needs_several_steps_is_right_as_one_leaf() -> None:
    def loss_fn(y: Tensor, target: Tensor) -> Tensor:
        if len(y) < 10:
            raise ValueError("too short")
        return F.mse_loss(y, target)

    data = TensorSequence(*random_data(20))
    TBPTT(lstm(), lambda y, t: 2 * loss_fn(y, t), 10, 10, strategy="retain").train(data)
    with pytest.raises(
        ArgumentError, match="steps of a segment, and one may have as few: too short"
    ):
        TBPTT(lstm(), lambda y, t: 2 * loss_fn(y, t), 20, 20, strategy="uniform:10").train(data)
