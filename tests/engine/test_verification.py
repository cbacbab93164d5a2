"""`verify` tells a plan that gives a module its gradient from one that does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import (
    EXECUTORS,
    LANES,
    STRATEGIES,
    WIDTH,
    bitwise,
    lstm,
    masked_loss,
    mean_loss,
    random_data,
    random_state,
    tanh_cell,
)
from torch import Tensor, nn

from tbptt_ckpt import verify
from tbptt_ckpt.engine.verification import multiplies_in_tf32

NUM_STEPS = 7


class Disturbed(nn.Module):
    """Draws random numbers and counts in a buffer that feeds the output."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.cell = tanh_cell()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor, h: Any) -> tuple[Tensor, Tensor]:
        self.count += 1.0
        y, h = self.cell(x, h)
        return y * (1.0 + 0.1 * self.count.clone()), nn.functional.dropout(h, 0.3)


class Forgetful(nn.Module):
    """Carries half of its state where no boundary state can hold it."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.hidden = tanh_cell(), torch.zeros(())

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        y, h = self.cell(x, h + 0.5 * self.hidden)
        self.hidden = h.detach()
        return y, h


class Rotating(nn.Module):
    """A complex state and a complex weight."""

    def __init__(self) -> None:
        super().__init__()
        self.angle = nn.Parameter(torch.full((WIDTH,), 0.6 + 0.5j, dtype=torch.complex128))
        self.inward = nn.Linear(2, WIDTH).double()

    def forward(self, x: Tensor, z: Any) -> tuple[Tensor, Tensor]:
        z = self.inward(x) + self.angle * (0.0 if z is None else z)
        return z.real + z.imag, z


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("make", [tanh_cell, lstm, Disturbed, Rotating])
@pytest.mark.parametrize("loss_fn", [mean_loss, masked_loss])
def test_every_plan_verifies(loss_fn: Any, make: Any, strategy: str, executor: str) -> None:
    found = verify(
        make(),
        loss_fn,
        *random_data(NUM_STEPS),
        strategy=strategy,
        executor=executor,
        tolerance=1e-12,
    )
    assert found.ok, str(found)
    assert "equal to rounding" in str(found)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_state_outside_of_the_state_is_found_out(executor: str) -> None:
    module = Forgetful()
    found = verify(module, mean_loss, *random_data(NUM_STEPS), random_state(), executor=executor)
    assert not found.ok
    assert found.max_relative_error > 1e-3
    assert "DIFFERENT" in str(found)


class Nested(nn.Module):
    """A module with a layer inside."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


@pytest.mark.parametrize(
    ("module", "setting", "expected"),
    [
        (Nested(nn.LSTM(2, 3)), None, True),  # cuDNN's are by default
        (Nested(nn.Conv1d(2, 3, 1)), None, True),
        (Nested(nn.LSTMCell(2, 3)), None, False),  # cuBLAS's are not
        (Nested(nn.LSTMCell(2, 3)), torch.backends.cuda.matmul, True),
        (lambda x, state: (x, state), None, True),  # of which nothing is known
    ],
)
def test_products_in_tf32_are_known(
    monkeypatch: pytest.MonkeyPatch, module: Any, setting: Any, expected: bool
) -> None:
    card, before = torch.device("cuda:0"), setting and setting.fp32_precision
    monkeypatch.setattr(torch.cuda, "is_tf32_supported", lambda: True)
    try:
        if setting is not None:
            setting.fp32_precision = "tf32"
        assert multiplies_in_tf32(module, card) == expected
        assert not multiplies_in_tf32(module, torch.device("cpu"))
        monkeypatch.setattr(torch.cuda, "is_tf32_supported", lambda: False)
        assert not multiplies_in_tf32(module, card)
    finally:
        if setting is not None:
            setting.fp32_precision = before


def test_what_tf32_rounds_is_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    data = [tensor.float() for tensor in random_data(NUM_STEPS)]
    usual = verify(tanh_cell().float(), mean_loss, *data)
    assert usual.tolerance < 1e-3
    assert "TF32" not in str(usual)
    monkeypatch.setattr("tbptt_ckpt.engine.verification.multiplies_in_tf32", lambda *_: True)
    found = verify(tanh_cell().float(), mean_loss, *data)
    assert found.tolerance == 1e-2
    assert "products in TF32: equal to rounding" in str(found)
    assert verify(tanh_cell().double(), mean_loss, *random_data(NUM_STEPS)).tolerance < 1e-7
    assert verify(tanh_cell().float(), mean_loss, *data, tolerance=1e-4).tolerance == 1e-4


def test_a_complex_difference_is_seen() -> None:
    class Drifting(Rotating):
        def forward(self, x: Tensor, z: Any) -> tuple[Tensor, Tensor]:
            y, z = super().forward(x, z)
            return y, z if torch.is_grad_enabled() else z + 0.1j

    assert verify(Rotating(), mean_loss, *random_data(NUM_STEPS), strategy="step").ok
    found = verify(Drifting(), mean_loss, *random_data(NUM_STEPS), strategy="step")
    assert found.state_error > 1e-3


@pytest.mark.parametrize("computed", [False, True])
def test_everything_is_left_as_it_was(computed: bool) -> None:
    module, leaf = Disturbed(), random_state().requires_grad_()
    init = torch.sin(leaf) if computed else leaf
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    leaf.grad = torch.full((LANES, WIDTH), 2.0, dtype=torch.float64)
    weights = [parameter.detach().clone() for parameter in module.parameters()]
    generator = torch.get_rng_state()
    assert verify(module, mean_loss, *random_data(NUM_STEPS), init).ok
    assert bitwise([p.detach() for p in module.parameters()], weights)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in module.parameters())
    assert torch.equal(leaf.grad, torch.full_like(leaf, 2.0))
    assert torch.equal(torch.get_rng_state(), generator)
    assert module.count == 0
