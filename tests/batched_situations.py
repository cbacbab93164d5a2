"""Operations that time batching takes, and what modules do around them within a step.

Each situation is a step `(module, (x, words), state) -> (output, state)`; the module has an
operation, and where that gets its input from. Everything is plain PyTorch: what a loop by hand
makes of it is the truth.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

STEPS, LANES, WIDTH, WORDS = 7, 3, 4, 6
SOURCES = ("input", "words", "made", "state")
Inputs = tuple[Tensor, Tensor]
Step = Callable[["Situated", Inputs, Any], tuple[Tensor, Any]]


class Situated(nn.Module):
    """One operation in one situation."""

    def __init__(self, operation: str, source: str, step: Step) -> None:
        super().__init__()
        self.operation, self.source, self.step = operation, source, step
        self.linear, self.hidden = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.square = nn.Parameter(torch.randn(WIDTH, WIDTH) / 2)
        self.added = nn.Parameter(torch.randn(WIDTH))
        self.words, self.bilinear = nn.Embedding(WORDS, WIDTH), nn.Bilinear(WIDTH, WIDTH, WIDTH)
        self.along = nn.Conv1d(1, 1, 3, padding=1)
        self.plane = nn.Conv2d(1, 1, (1, 3), padding=(0, 1))
        self.lstm, self.gru = nn.LSTMCell(WIDTH, WIDTH), nn.GRUCell(WIDTH, WIDTH)
        self.tanh = nn.RNNCell(WIDTH, WIDTH)
        self.relu = nn.RNNCell(WIDTH, WIDTH, nonlinearity="relu")

    def forward(self, inputs: Inputs, state: Any) -> tuple[Tensor, Any]:
        return self.step(self, inputs, state)

    def given(self, inputs: Inputs, h: Tensor) -> Tensor:
        """[N, D], from where this module's operation gets it."""
        x, words = inputs
        if self.source == "state":
            return h
        if self.source == "words":
            return self.words(words)
        return x if self.source == "input" else self.linear(x)

    def operate(self, x: Tensor, h: Tensor) -> Tensor:
        return OPERATIONS[self.operation][0](self, x, h)

    def mixed(self, y: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.hidden(h) + 0.5 * y)

    @property
    def weight(self) -> nn.Parameter:
        return self.get_parameter(OPERATIONS[self.operation][1])


def indices(x: Tensor) -> Tensor:
    return (x.detach().abs().double().sum(-1) * 3).long() % WORDS


# What each is, the name of its weight, and what the report calls it.
OPERATIONS: dict[str, tuple[Callable[[Any, Tensor, Tensor], Tensor], str, str]] = {
    "linear": (lambda m, x, h: m.linear(x), "linear.weight", "linear"),
    "function": (lambda m, x, h: F.linear(x, m.square), "square", "linear"),
    "at": (lambda m, x, h: x @ m.square, "square", "matmul"),
    "at transposed": (lambda m, x, h: x @ m.square.t(), "square", "linear"),
    "mm": (lambda m, x, h: torch.mm(x, m.square), "square", "matmul"),
    "addmm": (lambda m, x, h: torch.addmm(m.added, x, m.square.t()), "square", "linear"),
    "matmul": (lambda m, x, h: torch.matmul(x[:, None], m.square)[:, 0], "square", "matmul"),
    "embedding": (lambda m, x, h: m.words(indices(x)), "words.weight", "embedding"),
    "bilinear": (lambda m, x, h: m.bilinear(x, h), "bilinear.weight", "bilinear"),
    "conv1d": (lambda m, x, h: m.along(x[:, None])[:, 0], "along.weight", "conv1d"),
    "conv2d": (lambda m, x, h: m.plane(x[:, None, None])[:, 0, 0], "plane.weight", "conv2d"),
    "lstm": (
        lambda m, x, h: torch.stack(m.lstm(x, (h, h * 0.5))).sum(0),
        "lstm.weight_hh",
        "LSTMCell",
    ),
    "gru": (lambda m, x, h: m.gru(x, h), "gru.weight_hh", "GRUCell"),
    "tanh": (lambda m, x, h: m.tanh(x, h), "tanh.weight_hh", "RNNCell tanh"),
    "relu": (lambda m, x, h: m.relu(x, h), "relu.weight_hh", "RNNCell relu"),
}


def energy(x: Tensor) -> Tensor:
    return x.abs().square().sum()


def finished(m: Situated, y: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    h = m.mixed(y, h)
    return h * 2, h


def plain(m: Situated, inputs: Inputs, h: Tensor) -> tuple[Tensor, Tensor]:
    return finished(m, m.operate(m.given(inputs, h), h), h)


def in_a_checkpoint(use_reentrant: bool) -> Step:
    def step(m: Situated, inputs: Inputs, h: Tensor) -> tuple[Tensor, Tensor]:
        given = m.given(inputs, h)
        return finished(m, checkpoint(m.operate, given, h, use_reentrant=use_reentrant), h)

    return step


def within(context: Callable[[], Any]) -> Step:
    """The operation once within a context, once outside of it."""

    def step(m: Situated, inputs: Inputs, h: Tensor) -> tuple[Tensor, Tensor]:
        with context():
            inside = m.operate(m.given(inputs, h), h) + torch.zeros(WIDTH, dtype=h.dtype)
        return finished(m, m.operate(m.given(inputs, h), h) + inside.clone(), h)

    return step


class Doubling(TorchFunctionMode):
    """Changes what products return."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        names = ("linear", "mm", "matmul", "addmm", "embedding", "bilinear", "conv1d", "conv2d")
        return result * 2 if getattr(func, "__name__", "") in names else result


class DoublingBelow(TorchDispatchMode):
    """The same, of what reaches the kernels."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten, result = torch.ops.aten, func(*args, **(kwargs or {}))
        doubled = (aten.mm, aten.addmm, aten.embedding, aten.convolution)
        return result * 2 if func in [packet.default for packet in doubled] else result


def differentiated(keep: bool, create: bool = False) -> Step:
    """A gradient of the weight within the step."""

    def step(m: Situated, inputs: Inputs, h: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = h.detach().requires_grad_()
            inner = energy(m.operate(m.given(inputs, leaf), leaf))
            how = {"retain_graph": keep, "create_graph": create}
            (slope,) = torch.autograd.grad(inner, m.weight, **how)
        scale = 1 + 1e-2 * torch.tanh(energy(slope))
        return finished(m, m.operate(m.given(inputs, h), h) * scale, h)

    return step


def in_the_backward(keep: bool) -> Step:
    """A gradient of the weight within the backward of the leaf."""

    def step(m: Situated, inputs: Inputs, h: Tensor) -> tuple[Tensor, Tensor]:
        new_h = m.mixed(m.operate(m.given(inputs, h), h), h)
        if new_h.requires_grad:
            before = h.detach()
            inner, weight = energy(m.operate(m.given(inputs, before), before)), m.weight

            def hook(grad: Tensor) -> Tensor:
                (slope,) = torch.autograd.grad(inner, weight, retain_graph=keep)
                return grad * (1 + 1e-2 * torch.tanh(energy(slope)))

            new_h.register_hook(hook)
        return new_h * 2, new_h

    return step


def skips(asks_first: bool) -> Step:
    """Steps without numbers have no part; what is asked of them before that is not used."""

    def step(m: Situated, inputs: Inputs, h: Tensor) -> tuple[Tensor, Tensor]:
        if asks_first and m.source != "words":
            m.operate(m.given(inputs, h), h)
        if bool(torch.isnan(inputs[0]).any()):
            return m.hidden(h) * 2, h * 0.9
        return plain(m, inputs, h)

    return step


def written_before(m: Situated, inputs: Inputs, h: Tensor) -> tuple[Tensor, Tensor]:
    given = m.given(inputs, h) if m.source in ("words", "made") else m.given(inputs, h) * 1
    return finished(m, m.operate(given.mul_(0.5), h), h)


def written_after(m: Situated, inputs: Inputs, h: Tensor) -> tuple[Tensor, Tensor]:
    given = m.given(inputs, h) if m.source in ("words", "made") else m.given(inputs, h) * 1
    new_h = m.mixed(m.operate(given, h), h)
    return new_h + given.mul_(2), new_h


def written_a_step_later(m: Situated, inputs: Inputs, state: Any) -> tuple[Tensor, Any]:
    """When the rows that were made together with it have all been used."""
    h, before, step = state
    given = m.given(inputs, h) * (1 if m.source in ("words", "made") else 2)
    given = m.given(inputs, h) if m.source in ("words", "made") else given
    new_h = m.mixed(m.operate(given, h), h)
    if step and step % 2 == 0:
        before.mul_(2)
    return new_h + before, (new_h, given, step + 1)


def output_written(m: Situated, inputs: Inputs, h: Tensor) -> tuple[Tensor, Tensor]:
    return finished(m, m.operate(m.given(inputs, h), h).mul_(0.7).add_(0.1), h)


def memory_written(m: Situated, inputs: Inputs, h: Tensor) -> tuple[Tensor, Tensor]:
    given = m.given(inputs, h)
    new_h, c = m.lstm(given, (h, h * 0.5))
    return finished(m, new_h.mul_(0.8) + c.mul_(0.9) + m.operate(given, h), h)


def weight_written(m: Situated, inputs: Inputs, h: Tensor) -> tuple[Tensor, Tensor]:
    result = plain(m, inputs, h)
    with torch.no_grad():
        m.weight.mul_(1.01)
    return result


def frozen_by_data(m: Situated, inputs: Inputs, h: Tensor) -> tuple[Tensor, Tensor]:
    m.weight.requires_grad_(bool(inputs[1][0] % 2))
    y = m.operate(m.given(inputs, h), h)
    m.weight.requires_grad_()
    return finished(m, y, h)


def frozen_at_first(m: Situated, inputs: Inputs, h: Tensor) -> tuple[Tensor, Tensor]:
    m.weight.requires_grad_(False)
    y = m.operate(m.given(inputs, h), h)
    m.weight.requires_grad_()
    return finished(m, y + m.operate(m.given(inputs, h), h), h)


def transformed(m: Situated, inputs: Inputs, h: Tensor) -> tuple[Tensor, Tensor]:
    def inner(x: Tensor) -> Tensor:
        return energy(m.operate(x, x))

    return finished(m, torch.func.grad(inner)(m.given(inputs, h)), h)


def mapped(m: Situated, inputs: Inputs, h: Tensor) -> tuple[Tensor, Tensor]:
    def inner(x: Tensor, h: Tensor) -> Tensor:
        return m.operate(x[None], h[None])[0]

    return finished(m, torch.func.vmap(inner)(m.given(inputs, h), h), h)


def used_twice(m: Situated, inputs: Inputs, h: Tensor) -> tuple[Tensor, Tensor]:
    given = m.given(inputs, h)
    new_h = m.mixed(m.operate(given, h) + m.operate(given, h).sin(), h)
    return new_h * 2, m.operate(new_h, h) * 0.5 + new_h


def some_lanes(m: Situated, inputs: Inputs, h: Tensor) -> tuple[Tensor, Tensor]:
    """Those whose word is even: perhaps none."""
    given, chosen = m.given(inputs, h), inputs[1] % 2 == 0
    new_h = m.mixed(given, h).clone()
    new_h[chosen] = new_h[chosen] + m.operate(given[chosen], h[chosen])
    return new_h * 2, torch.tanh(new_h)


def in_another_thread(m: Situated, inputs: Inputs, h: Tensor) -> tuple[Tensor, Tensor]:
    given, in_leaf = m.given(inputs, h), torch.is_grad_enabled()

    def work() -> Tensor:
        with torch.set_grad_enabled(in_leaf):
            return m.operate(given, h)

    with ThreadPoolExecutor(1) as threads:
        found = threads.submit(work).result()
    return finished(m, found + m.operate(given, h), h)


def expanded(m: Situated, inputs: Inputs, h: Tensor) -> tuple[Tensor, Tensor]:
    return finished(m, m.operate(m.given(inputs, h)[:1].expand(LANES, WIDTH), h), h)


SITUATIONS: dict[str, Step] = {
    "plain": plain,
    "checkpoint": in_a_checkpoint(False),
    "reentrant checkpoint": in_a_checkpoint(True),
    "inference mode": within(torch.inference_mode),
    "no_grad": within(torch.no_grad),
    "a device": within(lambda: torch.device("cpu")),
    "a function mode": within(Doubling),
    "a dispatch mode": within(DoublingBelow),
    "inner gradient": differentiated(keep=False),
    "inner gradient, kept": differentiated(keep=True),
    "inner gradient, differentiated": differentiated(keep=True, create=True),
    "gradient in the backward": in_the_backward(keep=False),
    "gradient in the backward, kept": in_the_backward(keep=True),
    "skipped steps": skips(asks_first=False),
    "skipped steps, asked": skips(asks_first=True),
    "written before": written_before,
    "written after": written_after,
    "written a step later": written_a_step_later,
    "output written": output_written,
    "memory written": memory_written,
    "weight written": weight_written,
    "frozen by data": frozen_by_data,
    "frozen at first": frozen_at_first,
    "torch.func.grad": transformed,
    "torch.func.vmap": mapped,
    "used twice": used_twice,
    "some lanes": some_lanes,
    "another thread": in_another_thread,
    "expanded": expanded,
}
