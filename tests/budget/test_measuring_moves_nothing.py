"""Measuring runs the user's module: what that moves, and nobody puts back, is an error.

Each module here is trained where nothing runs again but to be measured.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import gradients, relative_error
from grids import covering
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from tbptt_ckpt import TBPTT, TensorSequence
from tbptt_ckpt.errors import ReplayMismatchError

NUM_STEPS, LANES, WIDTH = 24, 3, 4
PLANNED: dict[str, dict[str, Any]] = {
    "auto": {"strategy": "auto"},
    "optimal": {"strategy": "optimal"},
    "a budget": {"strategy": "retain", "memory_budget": "64MiB"},
}
DTYPES = (torch.float32, torch.float64)


class Net(nn.Module):
    """A recurrence of torch's behind a factor that `moved` gives, in the input or in the output."""

    def __init__(self, kind: type[nn.Module], moved: Callable[[Any], float], place: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.moved, self.place = kind(WIDTH, WIDTH), moved, place
        self.calls = 0

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        self.calls += 1
        factor = self.moved(self)
        given = self.inner(x * factor if self.place == "input" else x, state)
        if isinstance(self.inner, nn.RNNBase):
            output, state = given
        else:
            output, state = (given[0] if isinstance(given, tuple) else given), given
        return output * factor if self.place == "output" else output, state


KINDS = (nn.GRUCell, nn.LSTMCell, nn.GRU)


def counts(net: Any) -> float:
    return 1 + 0.1 * net.calls


def counts_slowly(net: Any) -> float:
    return 1 + 1e-7 * net.calls  # float32 keeps about that


def changes_once(net: Any) -> float:
    return 1.0 if net.calls < NUM_STEPS // 2 else 1.5


def draws_unseen() -> Callable[[Any], float]:
    source = torch.Generator().manual_seed(1)
    return lambda net: 1 + float(torch.rand((), generator=source))


def remembers_its_first_input(net: Any) -> float:
    net.__dict__.setdefault("first", net.calls)
    return 1.0 + (net.first != net.calls)


KEPT_OUTSIDE: dict[str, Callable[[], Callable[[Any], float]]] = {
    "a counter": lambda: counts,
    "a slow counter": lambda: counts_slowly,
    "a threshold": lambda: changes_once,
    "a generator in a closure": draws_unseen,
    "what was made in the first call": lambda: remembers_its_first_input,
}


def data_of(dtype: torch.dtype) -> TensorSequence:
    source = torch.Generator().manual_seed(1)
    return TensorSequence(*torch.randn(2, NUM_STEPS, LANES, WIDTH, generator=source, dtype=dtype))


def trained(net: Net, dtype: torch.dtype, **options: Any) -> None:
    per_step = not isinstance(net.inner, nn.RNNBase)
    tbptt = TBPTT(net, mse_loss, NUM_STEPS, NUM_STEPS, per_step=per_step, **options)
    tbptt.train(data_of(dtype))


@pytest.mark.times_the_module
@covering(name=KEPT_OUTSIDE, kind=KINDS, planned=PLANNED, place=("input", "output"), dtype=DTYPES)
def test_what_measuring_moves_is_an_error(
    name: str, kind: type[nn.Module], planned: str, place: str, dtype: torch.dtype
) -> None:
    net = Net(kind, KEPT_OUTSIDE[name](), place).to(dtype)
    with pytest.raises(ReplayMismatchError, match="measured, and step 0 acts otherwise"):
        trained(net, dtype, **PLANNED[planned])
    assert not any(p.grad is not None for p in net.parameters())


class Found(Net):
    """Draws from all that is put back, and counts in a buffer."""

    def __init__(self, kind: type[nn.Module], moved: Callable[[Any], float], place: str) -> None:
        super().__init__(kind, moved, place)
        self.hidden = random.Random(3)
        self.generator = torch.Generator().manual_seed(0)
        self.numpys = np.random.default_rng(0)
        self.register_buffer("steps", torch.zeros(()))


def draws_what_is_put_back(net: Any) -> float:
    net.steps += 1
    drawn = random.random() + net.hidden.random() + float(net.numpys.random())
    return 0.5 + drawn + float(torch.rand(1)) + float(torch.rand(1, generator=net.generator))


@pytest.mark.times_the_module
@covering(together=1, kind=KINDS[:2], planned=PLANNED, place=("input", "output"), dtype=DTYPES)
def test_what_is_put_back_gives_the_gradient_of_a_run_that_measures_nothing(
    kind: type[nn.Module], planned: str, place: str, dtype: torch.dtype
) -> None:
    found = []
    for options in ({"strategy": "retain"}, PLANNED[planned]):
        random.seed(1)
        torch.manual_seed(1)
        net = Found(kind, draws_what_is_put_back, place).to(dtype)
        trained(net, dtype, **options)
        found.append((gradients(list(net.parameters())), net.steps, random.random()))
    assert relative_error(found[0][0], found[1][0]) <= (1e-12 if dtype is torch.float64 else 1e-5)
    assert found[0][1:] == found[1][1:]


@pytest.mark.times_the_module
def test_it_is_left_unchecked_where_that_is_asked_for() -> None:
    trained(Net(nn.GRUCell, counts, "input"), torch.float32, strategy="auto", check_replays=False)


@pytest.mark.exhaustive
@pytest.mark.times_the_module
def test_rounding_that_differs_in_every_run_is_no_difference() -> None:
    source = torch.Generator().manual_seed(1)
    for size in (1e-7, 1e-5):
        noise = [1 + size * float(torch.randn((), generator=source)) for _ in range(1000)]
        net = Net(nn.GRUCell, lambda net, noise=noise: noise[net.calls % 1000], "input")
        trained(net, torch.float32, strategy="auto")


@pytest.mark.times_the_module
def test_what_only_later_steps_show_is_not_seen() -> None:
    def late(net: Any) -> float:
        return 1 + (0.1 * net.calls if float(net.seen) > 0.5 else 0.0)

    class Late(Net):
        def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
            self.seen = x[0, 0]
            return super().forward(x, state)

    source = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, NUM_STEPS, LANES, WIDTH, generator=source)
    x[:, 0, 0] = torch.arange(NUM_STEPS) > 2
    found = []
    for budget in (None, "64MiB"):
        net = Late(nn.GRUCell, late, "input")
        steps, data = NUM_STEPS, TensorSequence(x, y)
        TBPTT(net, mse_loss, steps, steps, strategy="retain", memory_budget=budget).train(data)
        found.append(gradients(list(net.parameters())))
    assert relative_error(*found) > 1e-3
