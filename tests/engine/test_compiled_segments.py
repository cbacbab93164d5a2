"""Segment modules that a user has compiled: torch compiles them anew for each length of a call."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, TbpttWarning, TensorSequence


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


@pytest.mark.parametrize("how", [{"memory_budget": "10MiB"}, {"strategy": "optimal"}], ids=str)
@pytest.mark.parametrize("make", [compiled, lambda: Wrapper(compiled())])
def test_plans_of_many_lengths_are_told_in_one_line(
    make: Callable[[], nn.Module], how: dict[str, Any]
) -> None:
    (given,) = how
    with pytest.warns(TbpttWarning, match=f"is compiled, .*{given}=.* many lengths") as told:
        TBPTT(make(), F.mse_loss, 100, None, per_step=False, **how)
    assert [each.filename for each in told] == [__file__]
