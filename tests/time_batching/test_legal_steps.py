"""Time batching: what a module may do in a step has the gradient, or the error, of a plain loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from batched_modules import (
    CELLS,
    EXECUTORS,
    INPUTS,
    LANES,
    STEPS,
    WIDTH,
    WORDS,
    OfLinears,
    by_hand,
    by_window,
    check,
    elman,
    make_cell,
    make_data,
    make_linears,
    make_state,
)
from cases import relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tbptt_ckpt import TbpttError, run_window

Step = Callable[[Any, Tensor, Any], tuple[Tensor, Any]]


class Stepping(nn.Module):
    """A module with words, cells and linear maps, whose step is a function."""

    def __init__(self, step: Step, cell: str = "gru") -> None:
        super().__init__()
        self.step = step
        self.words, self.cell = nn.Embedding(WORDS, INPUTS), CELLS[cell](INPUTS, WIDTH, bias=True)
        self.wx, self.wh = nn.Linear(INPUTS, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self.step(self, x, state)


def stepping(step: Step, cell: str = "gru") -> Stepping:
    torch.manual_seed(0)
    return Stepping(step, cell).double()


def compare(module: nn.Module, inputs: Tensor, **how: Any) -> None:
    """Hold a window over these inputs against a plain loop."""
    targets = torch.randn(STEPS, LANES, WIDTH, dtype=torch.float64)
    state, parameters = make_state(module), list(module.parameters())
    _, expected = by_hand(module, parameters, (inputs, targets), state)
    how = {"strategy": "uniform:3", **how}
    _, found = by_window(module, parameters, (inputs, targets), state, **how)
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error([ours], [theirs]) <= 1e-12


def numbers() -> Tensor:
    return make_data()[0]


def tokens() -> Tensor:
    return torch.randint(WORDS, (STEPS, LANES), generator=torch.Generator().manual_seed(3))


def h_of(state: Any) -> Tensor:
    return state[0] if isinstance(state, tuple) else state


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("name", ["linear", "matmul", "transpose", "convolution"])
def test_complex_numbers(name: str, executor: str) -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wx = nn.Linear(INPUTS, WIDTH, dtype=torch.complex128)
            self.wh = nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=torch.complex128) / 3)
            self.kernel = nn.Parameter(torch.randn(1, 1, 3, dtype=torch.complex128) / 3)

        def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            if name == "linear":
                product = F.linear(h, self.wh)
            elif name == "convolution":
                product = F.conv1d(h[:, None], self.kernel, padding=1)[:, 0]
            else:
                product = h @ (self.wh if name == "matmul" else self.wh.t())
            h = torch.tanh(self.wx(x) + product)
            return h, h

    torch.manual_seed(0)
    module = Complex()
    inputs = torch.randn(STEPS, LANES, INPUTS, dtype=torch.complex128)
    state = torch.zeros(LANES, WIDTH, dtype=torch.complex128)
    targets = torch.randn(STEPS, LANES, WIDTH, dtype=torch.float64)
    grads = []
    for batching in (True, None):
        module.zero_grad()
        if batching:
            how = {"strategy": "uniform:3", "executor": executor, "time_batching": True}
            run_window(module, square, inputs, targets, state, **how)
        else:
            h, losses = state, []
            for x, target in zip(inputs, targets, strict=True):
                y, h = module(x, h)
                losses.append(square(y, target))
            torch.stack(losses).mean().backward()
        grads.append(
            [torch.view_as_real(p.grad) for p in module.parameters() if p.grad is not None]
        )
    assert relative_error(*grads) <= 1e-12


def square(y: Tensor, target: Tensor) -> Tensor:
    return (y.real - target).square().mean() + y.imag.square().mean()


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("lanes", [LANES, WIDTH])
@pytest.mark.parametrize("name", ["linear", "rows", *CELLS])
def test_a_checkpoint_within_the_step(name: str, lanes: int, executor: str) -> None:
    """Its recomputation meets no region: with as many lanes as features the shapes agree."""

    def step(m: Stepping, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        if name == "linear":
            state = torch.tanh(m.wx(x) + checkpoint(m.wh, state, use_reentrant=False))
        elif name == "rows":
            state = torch.tanh(m.wh(state) * checkpoint(m.wx, x, use_reentrant=False))
        else:
            state = checkpoint(m.cell, x, state, use_reentrant=False)
        return h_of(state) * 2, state

    module = stepping(step, name if name in CELLS else "gru")
    inputs = torch.randn(STEPS, lanes, INPUTS, dtype=torch.float64)
    targets = torch.randn(STEPS, lanes, WIDTH, dtype=torch.float64)
    zeros, parameters = torch.zeros(lanes, WIDTH, dtype=torch.float64), list(module.parameters())
    state = (zeros, zeros) if name == "lstm" else zeros
    _, expected = by_hand(module, parameters, (inputs, targets), state)
    how = {"strategy": "uniform:3", "executor": executor}
    _, found = by_window(module, parameters, (inputs, targets), state, **how)
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error([ours], [theirs]) <= 1e-12


def inner_gradient(m: Stepping, x: Tensor, state: Any, of: str, keep: bool) -> Tensor:
    """Of a weight, from a part of the step that ends there."""
    with torch.enable_grad():
        if of == "cell":
            detached = tuple(s.detach() for s in state) if isinstance(state, tuple) else None
            output, weight = m.cell(x, detached or state.detach()), m.cell.weight_hh
        elif of == "rows":
            output, weight = m.wx(x), m.wx.weight
        else:
            output, weight = h_of(state).detach() @ m.wh.weight, m.wh.weight
            output = output + m.wh(h_of(state).detach())
        energy = h_of(output).square().sum()
        return torch.autograd.grad(energy, weight, retain_graph=keep)[0].sum()


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("of", ["linear", "rows", "cell"])
@pytest.mark.parametrize("cell", CELLS)
def test_a_gradient_of_a_weight_taken_within_a_step(
    cell: str, of: str, keep: bool, executor: str
) -> None:
    def step(m: Stepping, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        scale = 1 + 1e-2 * torch.tanh(inner_gradient(m, x, state, of, keep))
        state = m.cell(x * 1, m.cell(x, state))
        return h_of(state) * scale + m.wx(x) + m.wh(h_of(state)) + h_of(state) @ m.wh.weight, state

    compare(stepping(step, cell), numbers(), executor=executor)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("of", ["linear", "rows", "cell"])
def test_a_gradient_taken_within_the_backward(of: str, executor: str) -> None:
    def step(m: Stepping, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        new_h = m.cell(x, h) + m.wx(x) + m.wh(h)
        if new_h.requires_grad:
            before = h.detach()
            outputs = {"linear": lambda: m.wh(before), "rows": lambda: m.wx(x)}
            energy = outputs.get(of, lambda: m.cell(x * 1, before))().square().sum()
            weight = {"linear": m.wh.weight, "rows": m.wx.weight}.get(of, m.cell.weight_hh)

            def hook(grad: Tensor) -> Tensor:
                (inner,) = torch.autograd.grad(energy, weight, retain_graph=True)
                return grad * (1 + 1e-2 * torch.tanh(inner.sum()))

            new_h.register_hook(hook)
        return new_h * 2, new_h

    compare(stepping(step), numbers(), executor=executor)


class _Inside(torch.autograd.Function):
    """A function that differentiates a graph of its own in its backward."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, x: Tensor, x_weight: Tensor) -> Tensor:
        with torch.enable_grad():
            ctx.leaf = h.detach().requires_grad_()
            ctx.output = torch.tanh(F.linear(ctx.leaf, weight) + F.linear(x, x_weight))
        ctx.weights = weight, x_weight
        return ctx.output.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        h, w, xw = torch.autograd.grad(ctx.output, (ctx.leaf, *ctx.weights), grad)
        return h, w, None, xw


def test_a_function_that_differentiates_a_graph_of_its_own() -> None:
    def step(m: Stepping, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = _Inside.apply(h, m.wh.weight, x, m.wx.weight)
        return h * 2, h

    compare(stepping(step), numbers())


@pytest.mark.parametrize("asks_first", [False, True])
@pytest.mark.parametrize("name", ["linear", "cell"])
def test_a_step_that_is_skipped_may_hold_no_numbers(name: str, asks_first: bool) -> None:
    def step(m: Stepping, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        projected = m.wx(x) if name == "linear" and asks_first else None
        if bool(torch.isnan(x).any()):
            return m.wh(h), h * 0.9
        if name == "cell":
            h = m.cell(x, h)
        else:
            h = torch.tanh(m.wh(h) + (m.wx(x) if projected is None else projected))
        return h * 2, h

    inputs = numbers()
    inputs[2] = inputs[4, 1] = float("nan")
    compare(stepping(step), inputs)


@pytest.mark.parametrize("name", ["linear", "cell"])
def test_a_step_that_is_skipped_may_hold_an_index_of_no_word(name: str) -> None:
    def step(m: Stepping, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        if bool((x < 0).any()):
            return m.wh(h), h * 0.9
        word = m.words(x)
        h = m.cell(word, h) if name == "cell" else torch.tanh(m.wh(h) + m.wx(word))
        return h * 2, h

    indices = tokens()
    indices[2] = -1
    compare(stepping(step), indices)
    indices[2] = WORDS
    module = stepping(step)
    with pytest.raises(IndexError):
        compare(module, indices)
    with pytest.raises(IndexError):
        by_window(module, [], (indices, torch.zeros(STEPS, LANES, WIDTH)), make_state(module))


def test_a_word_in_a_step_that_is_skipped_reaches_what_reads_it_through_words() -> None:
    def step(m: Stepping, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        word = m.words(x)
        if bool((x[0] == 0).any()):
            return m.wh(h), h * 0.9
        h = torch.tanh(m.cell(word, h) + m.wx(word) + word.sum())
        return h * 2, h

    compare(stepping(step), tokens())
    compare(stepping(step), tokens(), executor="checkpoint")


def test_inference_mode_within_a_step() -> None:
    def step(m: Stepping, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            looked_at = m.wx(x) + m.cell(x, h)
        h = torch.tanh(m.wx(x) + m.wh(h) + looked_at.clone())
        return h * 2, h

    compare(stepping(step), numbers())


class _Doubled:
    """Counts its calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.count = function, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        return self.function(*args, **kwargs) * 2


def test_a_function_that_others_replaced_is_called_and_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    doubled = _Doubled(F.linear)
    monkeypatch.setattr(F, "linear", doubled)
    check(make_linears(elman), strategy="uniform:3")
    assert F.linear is doubled
    doubled.count = 0
    by_window(make_linears(elman), [], make_data(), make_state(make_linears(elman)))
    assert doubled.count >= 3 * STEPS


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_a_cell_whose_forward_others_replaced_is_called_and_stays(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = kind.forward

    def forward(cell: Any, x: Tensor, state: Any = None) -> Any:
        result = own(cell, x, state)
        return (result[0] * 0.5, result[1]) if isinstance(result, tuple) else result * 0.5

    monkeypatch.setattr(kind, "forward", forward)
    name = {nn.LSTMCell: "lstm", nn.GRUCell: "gru", nn.RNNCell: "tanh"}[kind]
    check(make_cell(name), strategy="uniform:3")
    assert kind.forward is forward


def test_a_patch_that_is_made_within_a_step_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    doubled = _Doubled(torch.mm)
    monkeypatch.setattr(torch, "mm", torch.mm)  # put back at the end

    def step(m: OfLinears, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        torch.mm = doubled
        return elman(m, x, h)

    check(make_linears(step), strategy="uniform:3")
    assert torch.mm is doubled


@pytest.mark.parametrize("reader", ["linear", "cell"])
def test_a_row_that_is_written_to_after_its_use_is_an_error_as_without(reader: str) -> None:
    def step(m: Stepping, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        word = m.words(x)
        h = m.cell(word, h) if reader == "cell" else torch.tanh(m.wh(h) + m.wx(word))
        return h + word.mul_(2).sum(), h

    module = stepping(step)
    module.words.weight.requires_grad_(False)
    data = tokens(), torch.zeros(STEPS, LANES, WIDTH, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="inplace"):
        by_hand(module, [], data, make_state(module))
    for time_batching in (False, True):
        with pytest.raises(TbpttError, match="modified in place"):
            by_window(module, [], data, make_state(module), time_batching=time_batching)


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("reader", ["linear", "cell"])
def test_a_row_may_be_written_to_where_nobody_needs_it_any_more(reader: str, learns: bool) -> None:
    def step(m: Stepping, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        word = m.words(x)
        if bool(x[0] > 1):
            word.mul_(0.5)  # before its use
        h = m.cell(word, h) if reader == "cell" else torch.tanh(m.wh(h) + m.wx(word))
        return h + (word.mul_(2) if x[0] % 2 else word).sum(), h

    module = stepping(step)
    module.words.weight.requires_grad_(learns)
    module.wx.weight.requires_grad_(False)
    module.cell.weight_ih.requires_grad_(False)
    compare(module, tokens())
