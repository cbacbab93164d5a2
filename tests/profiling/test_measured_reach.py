"""`measure_reach`: exact against loops that are cut, and the reach of LSTMs that are known."""

from __future__ import annotations

import copy
from typing import Any

import cases
import pytest
import torch
import torch.nn.functional as F
from cut_windows import cut_at
from torch import Tensor, nn

from tbptt_ckpt import ArgumentError
from tbptt_ckpt.profiling import measure_reach

K1, K2, NUM_STEPS = 3, 17, 36  # the first window ends where all data have been run
TOLERANCES = (0.3, 1e-2, 1e-4)


@pytest.mark.parametrize("make", [cases.tanh_cell, cases.lstm_cell])
def test_every_border_is_exact_and_tolerances_lie_between_neighbours(make: Any) -> None:
    module = make()
    before = copy.deepcopy(module.state_dict())
    inputs, targets = cases.random_data(NUM_STEPS)
    given: dict[str, Any] = {"k1": K1, "k2": K2, "tolerances": TOLERANCES}
    found = measure_reach(module, F.mse_loss, inputs, targets, **given)
    (decay,) = found.decays
    cut = (module, NUM_STEPS)
    whole, _ = cut_at(*cut, NUM_STEPS - K2, NUM_STEPS - K1, NUM_STEPS)
    assert [border.steps_back for border in decay.borders] == [*range(1, K2 + 1)]
    errors = {}
    for border in decay.borders:
        part, state_grad = cut_at(*cut, NUM_STEPS - border.steps_back, NUM_STEPS - K1, NUM_STEPS)
        errors[border.steps_back] = error = float((whole - part).norm() / whole.norm())
        assert border.error == pytest.approx(error, rel=1e-9, abs=1e-14)
        assert border.norm in (None, pytest.approx(float(state_grad.norm()), rel=1e-9))
    for tolerance in TOLERANCES:
        reach = found.reach(tolerance)
        enough = [n for n in errors if all(errors[m] < tolerance for m in errors if m >= n)]
        assert (reach.within or K2) == min(enough)
        assert reach.above == min(enough) - 1
    assert all(map(torch.equal, before.values(), module.state_dict().values()))
    assert all(weight.grad is None for weight in module.parameters())


def test_several_windows_give_the_farthest_and_hold_small_gradients_against_the_mean() -> None:
    module, (inputs, targets) = cases.tanh_cell(), cases.random_data(3 * 18)
    loss_fn, given = (lambda y, t: (y * t).mean()), {"k1": K1, "k2": K2}
    one = measure_reach(module, loss_fn, inputs, targets, **given)
    three = measure_reach(module, loss_fn, inputs, targets, windows=3, **given)
    assert len(three.decays) == 3
    reaches = [decay.reach(1e-2) for decay in three.decays]
    assert three.reach(1e-2) in reaches
    assert three.reach(1e-2).steps == max(reach.steps for reach in reaches)
    assert one.decays[0].borders[0].norm == three.decays[0].borders[0].norm
    targets[51:] *= 1e-9
    quiet = measure_reach(module, loss_fn, inputs, targets, windows=2, **given)
    assert quiet.decays[1].reach(1e-3).steps == 1
    targets[:] = 0.0
    with pytest.raises(ArgumentError, match="none of them has a finite gradient"):
        measure_reach(module, loss_fn, inputs, targets, **given)
    with pytest.raises(ArgumentError, match="k2=2 is below k1=3"):
        measure_reach(module, loss_fn, inputs, targets, k1=3, k2=2)


class Readout(nn.Module):
    """An LSTM 128 wide whose forget gates begin `bias` higher."""

    def __init__(self, bias: float) -> None:
        super().__init__()
        self.core, self.out = nn.LSTM(128, 128), nn.Linear(128, 1)
        with torch.no_grad():
            self.core.bias_ih_l0[128:256] += bias

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = self.core(x, state)
        return self.out(y), state


@pytest.mark.parametrize("k2", [400, pytest.param(1000, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(("bias", "farthest"), [(0.0, 150), (2.0, 300), (5.0, None)])
def test_an_lstm_reaches_as_far_as_its_forget_gates_let_it(
    bias: float, farthest: int | None, k2: int
) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2 * k2, 8, 128), torch.randn(2 * k2, 8, 1)
    found = measure_reach(Readout(bias), F.mse_loss, x, y, k1=50, k2=k2, per_step=False)
    reach, growth = found.reach(1e-3), found.growth
    assert growth is not None
    if farthest is None:
        assert reach.within is None
        assert reach.above > 0.9 * k2
        assert growth > (10 if k2 == 1000 else 1)
    else:
        assert reach.within is not None
        assert 50 < reach.within <= farthest
        assert growth < 1e-5
