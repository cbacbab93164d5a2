"""`parametrize.cached()` keeps weights from run to run; those of an advance carry no graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import relative_error
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from tbptt_ckpt import TBPTT, TbpttWarning, TensorSequence, run_window
from tbptt_ckpt.executor.guard import GradientWatch

NUM_STEPS, LANES, WIDTH = 12, 2, 5


def cell(name: str) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = {"gru": nn.GRUCell, "lstm": nn.LSTMCell, "rnn": nn.RNNCell}[name](4, WIDTH)
    for weight in ("weight_hh", "weight_ih"):
        (parametrizations.weight_norm if weight == "weight_hh" else parametrizations.spectral_norm)(
            made.double(), weight
        )
    return made.eval()  # the spectral norm estimates nothing more


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((NUM_STEPS, LANES, 4), (NUM_STEPS, LANES, WIDTH))
    inputs, targets = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return inputs, targets


def loss(y: Any, target: Tensor) -> Tensor:
    return nn.functional.mse_loss(y[0] if isinstance(y, tuple) else y, target)


def grads(module: nn.Module) -> list[Tensor]:
    found = [parameter.grad for parameter in module.parameters()]
    assert all(grad is not None for grad in found)
    return [grad for grad in found if grad is not None]


@pytest.mark.parametrize("name", ["gru", "lstm", "rnn"])
@pytest.mark.parametrize("executor", ["replay", "checkpoint"])
@pytest.mark.parametrize("time_batching", [False, True])
def test_cached_weights_get_the_gradient_of_plain_ones(
    name: str, executor: Any, time_batching: bool
) -> None:
    plain = cell(name)
    inputs, targets = data()
    run_window(plain, loss, inputs, targets, strategy="retain", time_batching=False)
    for strategy in ("retain", "uniform:5", "step"):
        module = cell(name)
        options = {"strategy": strategy, "executor": executor, "time_batching": time_batching}
        with parametrize.cached():
            run_window(module, loss, inputs, targets, **options)
        assert relative_error(grads(module), grads(plain)) <= 1e-12


def test_windows_that_update_see_their_own_weights() -> None:
    plain, module = cell("gru"), cell("gru")
    sequence = TensorSequence(*data())

    def train(trained: nn.Module, strategy: str) -> None:
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        TBPTT(trained, loss, 3, 7, optimizer, strategy=strategy).train(sequence)

    train(plain, "retain")
    with parametrize.cached():
        train(module, "uniform:2")
    assert relative_error(list(module.parameters()), list(plain.parameters())) <= 1e-12


def test_a_window_of_constant_losses_has_lost_no_gradient() -> None:
    """Such as one whose targets all come before the steps that it differentiates."""
    module, watch = cell("gru"), GradientWatch()
    weights = list(module.parameters())
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    watch.look(weights, module, replays=True)
    module.zero_grad()
    watch.look(weights, module, replays=True)
    weights[0].grad = torch.ones_like(weights[0])
    with pytest.warns(TbpttWarning, match="got no gradient in a window, and had one before"):
        watch.look(weights, module, replays=True)
