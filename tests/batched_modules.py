"""Modules with products to batch, and plain BPTT by hand to hold them against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import naive
import torch
import torch.nn.functional as F
from cases import clear_gradients, gradients, relative_error
from devices import placed
from torch import Tensor, nn
from torch.func import functional_call

from tbptt_ckpt import TBPTT, TensorSequence, run_window

STEPS, LANES, INPUTS, WIDTH, OUTPUTS, WORDS = 7, 3, 4, 5, 2, 6
STRATEGIES = ("retain", "uniform:3", "step", "revolve:2")
EXECUTORS = ("replay", "checkpoint")


class WithCell(nn.Module):
    """A cell between two layers; `before` says what the cell is given.

    It asks for the grad mode, so that no trace finds its parts and the cell itself is called.
    """

    def __init__(self, cell: nn.RNNCellBase, before: str = "inputs") -> None:
        super().__init__()
        self.cell, self.before = cell, before
        self.first = nn.Linear(INPUTS, INPUTS)
        self.words = nn.Embedding(WORDS, INPUTS)
        self.readout = nn.Linear(WIDTH, OUTPUTS)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        torch.is_grad_enabled()
        if self.before == "words":
            x = self.words((x[:, 0].abs() * 2).long() % WORDS)
        elif self.before != "inputs":
            x = self.first(x)
        if self.before == "tanh":
            x = torch.tanh(x)
        state = self.cell(x, state)
        return self.readout(state[0] if isinstance(state, tuple) else state), state


class OfLinears(nn.Module):
    """A recurrence written with whatever `step` does; its weights are Wx, Wh and Wy."""

    def __init__(
        self, step: Callable[[OfLinears, Tensor, Tensor], tuple[Tensor, Tensor]], bias: bool = True
    ) -> None:
        super().__init__()
        self.step = step
        self.wx, self.wh = nn.Linear(INPUTS, WIDTH, bias), nn.Linear(WIDTH, WIDTH, bias)
        self.wy = nn.Linear(WIDTH, OUTPUTS, bias)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return self.step(self, x, h)


def elman(m: OfLinears, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    h = torch.tanh(m.wx(x) + m.wh(h))
    return m.wy(h), h


def used_twice(m: OfLinears, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    h = torch.tanh(m.wx(x) + m.wh(h))
    h = torch.tanh(m.wh(h) + 0.3 * m.wx(x) + m.wx(x).square())
    return m.wy(h) + m.wy(h * h), h


def other_ranks(m: OfLinears, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    lifted = m.wx(torch.stack([x, x * x, x + 1], 1)[:, None]).sum((1, 2))  # [N, 1, 3, K]
    one_by_one = torch.stack([m.wh(row) for row in h])  # [H]
    h = torch.tanh(lifted + one_by_one)
    return m.wy(h), h


def written_into(m: OfLinears, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    projected = m.wx(x)
    projected += 0.5
    h = m.wh(h).add_(F.relu(projected, inplace=True)).tanh_()
    return m.wy(h.clone()).mul_(2), h


def functions(m: OfLinears, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    h = torch.tanh(F.linear(input=x, weight=m.wx.weight) + F.linear(h, m.wh.weight, m.wh.bias))
    return F.linear(h, m.wy.weight, bias=m.wy.bias), h


def computed_weight(m: OfLinears, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    h = torch.tanh(F.linear(x, m.wx.weight * 2) + F.linear(h, m.wh.weight.tanh(), m.wh.bias))
    return m.wy(h), h


def tied(m: OfLinears, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    h = torch.tanh(m.wx(x) + m.wh(h))
    return m.wy(h) + h @ m.wh.weight[:, :OUTPUTS] + F.linear(h, m.wh.weight)[:, :OUTPUTS], h


def through_functional_call(m: OfLinears, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    leaf = functional_call(m.wh, {"weight": m.wh.weight, "bias": m.wh.bias}, (h,))
    scaled = functional_call(m.wx, {"weight": m.wx.weight * 0.5, "bias": m.wx.bias}, (x,))
    h = torch.tanh(leaf + scaled)
    return m.wy(h), h


def depends_on_data(m: OfLinears, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    h = torch.tanh(m.wh(h) + (m.wx(x) if x[0, 0] > 0 else 0.1))
    return m.wy(h), h


def differentiates_inside(m: OfLinears, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    h = torch.tanh(m.wx(x) + m.wh(h))
    if torch.is_grad_enabled():
        (inner,) = torch.autograd.grad(m.wh(h).square().sum(), h, retain_graph=True)
    else:
        with torch.enable_grad():
            leaf = h.detach().requires_grad_()
            (inner,) = torch.autograd.grad(m.wh(leaf).square().sum(), leaf)
    h = torch.tanh(h + 0.1 * inner)
    return m.wy(h), h


LINEAR_STEPS = (
    elman,
    used_twice,
    other_ranks,
    written_into,
    functions,
    computed_weight,
    tied,
    through_functional_call,
    depends_on_data,
    differentiates_inside,
)
CELLS: dict[str, Callable[..., nn.RNNCellBase]] = {
    "lstm": nn.LSTMCell,
    "gru": nn.GRUCell,
    "tanh": nn.RNNCell,
    "relu": lambda *sizes, bias: nn.RNNCell(*sizes, bias=bias, nonlinearity="relu"),
}


def make_cell(name: str, bias: bool = True, before: str = "inputs") -> WithCell:
    torch.manual_seed(0)
    return placed(WithCell(CELLS[name](INPUTS, WIDTH, bias=bias), before).double())


def make_linears(step: Any, bias: bool = True) -> OfLinears:
    torch.manual_seed(0)
    return placed(OfLinears(step, bias).double())


def make_data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(STEPS, LANES, INPUTS, generator=generator, dtype=dtype)
    targets = torch.randn(STEPS, LANES, OUTPUTS, generator=generator, dtype=dtype)
    return placed(inputs), placed(targets)


def make_state(module: nn.Module, dtype: torch.dtype = torch.float64) -> Any:
    generator = torch.Generator().manual_seed(2)
    h, c = placed(torch.randn(2, LANES, WIDTH, generator=generator, dtype=dtype))
    return (h, c) if isinstance(getattr(module, "cell", None), nn.LSTMCell) else h


def by_hand(
    module: Callable[..., Any], parameters: list[nn.Parameter], data: Any, init_state: Any
) -> tuple[Tensor, list[Tensor | None]]:
    """Loss and gradients of the weights and of the initial state."""
    clear_gradients(parameters)
    state = naive.mapped(lambda t: t.detach().clone().requires_grad_(), init_state)
    leaves, losses = naive.tensors(state), []
    for x, target in zip(*data, strict=True):
        y, state = module(x, state)
        losses.append(F.mse_loss(y, target))
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss.detach(), gradients([*parameters, *leaves])


def by_window(
    module: Callable[..., Any],
    parameters: list[nn.Parameter],
    data: Any,
    init_state: Any,
    **how: Any,
) -> tuple[Tensor, list[Tensor | None]]:
    clear_gradients(parameters)
    result = run_window(module, F.mse_loss, *data, init_state, **{"time_batching": True, **how})
    assert result.loss is not None
    return result.loss, gradients(parameters) + naive.tensors(result.init_state_grad)


def present(result: tuple[Tensor, list[Tensor | None]]) -> list[Tensor]:
    return [result[0], *(grad for grad in result[1] if grad is not None)]


def check(module: nn.Module, tolerance: float = 1e-12, **how: Any) -> None:
    """Hold a window against plain BPTT, gradient by gradient."""
    parameters, data, state = list(module.parameters()), make_data(), make_state(module)
    loss, expected = by_hand(module, parameters, data, state)
    found_loss, found = by_window(module, parameters, data, state, **how)
    assert relative_error([found_loss], [loss]) <= tolerance
    assert [g is None for g in found] == [g is None for g in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error([ours], [theirs]) <= tolerance, (how, ours, theirs)


def batched(module: nn.Module, data: Any, state: Any, **how: Any) -> set[str]:
    """The operations that a window batches."""
    how = {"strategy": "uniform:3", "time_batching": True, **how}
    tbptt = TBPTT(module, F.mse_loss, STEPS, None, **how)
    tbptt.train(TensorSequence(*data), state)
    return {o.operation for o in tbptt.batched_operations if not o.reason}
