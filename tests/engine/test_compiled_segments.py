"""Segment modules that a user has compiled: torch compiles them anew for each length of a call."""

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, TensorSequence


class Segment(nn.Module):
    """Writes down the lengths of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for one in x:
            h = torch.tanh(self.inner(h) + one)
            outputs.append(h)
        return torch.stack(outputs), h


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.lengths = inner, set[int]()

    def forward(self, x: Tensor, h: Tensor) -> Any:
        self.lengths.add(len(x))
        return self.inner(x, h)


def compiled() -> nn.Module:
    return torch.compile(Segment(), backend="eager", dynamic=False)


def train(module: nn.Module, **how: Any) -> None:
    inputs = torch.randn(100, 2, 3)
    tbptt = TBPTT(module, F.mse_loss, 100, None, per_step=False, **how)
    tbptt.train(TensorSequence(inputs, inputs), torch.zeros(2, 3))


@pytest.mark.times_the_module
def test_auto_keeps_to_one_length() -> None:
    module = Wrapper(compiled())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(module)
    assert module.lengths - {1, 2, 3, 4} == {10}  # what is looked at has up to four steps


@pytest.mark.times_the_module
@pytest.mark.parametrize("how", [{"memory_budget": "48KiB"}, {"strategy": "optimal"}], ids=str)
@pytest.mark.parametrize("wraps", [False, True])
def test_measured_plans_call_it_over_two_lengths(how: dict[str, Any], wraps: bool) -> None:
    """Compiled once for each mode that it is called in, less often than torch gives up."""
    module = Wrapper(compiled())
    torch._dynamo.utils.counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(module if wraps else torch.compile(module, backend="eager", dynamic=False), **how)
    assert module.lengths - {1, 2, 3, 4} == {16}  # what is looked at has up to four steps


@pytest.mark.parametrize(("k1", "k2"), [(7, 20), (16, 48), (100, None)])
def test_gradients_of_cut_calls_are_those_of_one_call(k1: int, k2: int | None) -> None:
    inputs, found = torch.randn(100, 2, 3).double(), []
    for how in ({"memory_budget": "48KiB", "measure_memory": True}, {"strategy": "retain"}):
        torch.manual_seed(0)
        module = torch.compile(Segment().double(), backend="eager", dynamic=False)
        inner = module if how != {"strategy": "retain"} else module._orig_mod
        tbptt = TBPTT(inner, F.mse_loss, k1, k2, per_step=False, **how)
        windows = list(tbptt.windows(TensorSequence(inputs, inputs), torch.zeros(2, 3).double()))
        found.append([parameter.grad for parameter in module.parameters()])
        assert all((window.peak_bytes or 0) <= 48 * 1024 for window in windows)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
