"""Steps whose products time batching may not take, or must take right (kinds of section 7)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .carriers import LANES, WIDTH, Loss, carried
from .case import Case, Dice

Step = Callable[["Two", Tensor, Tensor], tuple[Tensor, Tensor]]


class Two(nn.Module):
    """A layer of the input and one of the state, in a step that is given."""

    def __init__(self, step: Step, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.a, self.b = (nn.Linear(WIDTH, WIDTH, dtype=dtype) for _ in range(2))
        self.table = nn.Embedding(6, WIDTH)
        self.conv = nn.Conv1d(1, 1, 3, padding=1, dtype=dtype)
        self.step = step

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return self.step(self, x, state)


def _two(dice: Dice, step: Step, dtype: torch.dtype = torch.float64, **given: Any) -> Case:
    batching = {"time_batching": dice.choice((True, True, True, False, "auto"))}
    options = {**batching, **given.pop("options", {})}
    return carried(dice, lambda: Two(step, dtype), segment=False, options=options, **given)


def _next(m: Two, x: Tensor, h: Tensor) -> Tensor:
    return torch.tanh(m.a(x) + m.b(h))


def plain(dice: Dice) -> Case:
    """Products in every form: tied, scaled, transposed, sliced, in chains, used twice."""
    way = dice.choice(
        ("tied", "matmul", "scaled", "sliced", "chain", "addmm", "detached", "frozen")
    )

    def step(m: Two, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        if way == "tied":
            new = torch.tanh(m.a(x) + m.a(h))
        elif way == "matmul":
            new = torch.tanh(x @ m.a.weight.T + h @ m.b.weight)
        elif way == "scaled":
            new = torch.tanh(F.linear(x, 2 * m.a.weight, m.a.bias) + m.b(h))
        elif way == "sliced":
            new = torch.tanh(F.linear(x[:, :2], m.a.weight[:, :2]) + m.b(h))
        elif way == "chain":
            new = torch.tanh(m.b(m.a(torch.relu(m.a(x)))) + 0.5 * h)
        elif way == "addmm":
            new = torch.tanh(torch.addmm(m.a.bias, x, m.a.weight) + m.b(h))
        elif way == "detached":
            new = torch.tanh(m.a(x) + F.linear(h, m.b.weight.detach()) + m.b(x))
        else:
            new = torch.tanh(F.linear(x, m.table.weight.detach()[:WIDTH]) + m.b(h))
        return (new, new) if way != "chain" else (m.a(new), new)

    return _two(dice, step)


def _squared(y: Tensor, t: Tensor) -> Tensor:
    return (y.real - t).pow(2)


COMPLEX = Loss(
    function=lambda y, t: _squared(y, t).mean(),
    total=lambda y, t: _squared(y, t).sum(),
    count=lambda y, t: y.numel(),
)


def complex_weights(dice: Dice) -> Case:
    """Complex weights, whose gradients need conjugates."""
    way = dice.choice(("linear", "matmul", "diagonal"))

    def step(m: Two, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.complex(x, 0.3 * x)
        if way == "linear":
            new = 0.5 * (m.a(x) + m.b(h))
        elif way == "matmul":
            new = 0.5 * (x @ m.a.weight + h @ m.b.weight)
        else:
            new = h * m.b.bias + F.linear(x, m.a.weight)
        return new, new

    start = lambda: torch.zeros(LANES, WIDTH, dtype=torch.complex128)  # noqa: E731
    return _two(dice, step, torch.complex128, loss=COMPLEX, start=start)


def complex_convolution(dice: Dice) -> Case:
    """A complex convolution."""

    def step(m: Two, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        new = 0.5 * m.conv(torch.complex(x, 0.3 * x)[:, None])[:, 0] + 0.5 * m.b(h)
        return new, new

    start = lambda: torch.zeros(LANES, WIDTH, dtype=torch.complex128)  # noqa: E731
    return _two(dice, step, torch.complex128, loss=COMPLEX, start=start)


def skipped(dice: Dice) -> Case:
    """Rows that the module never multiplies: NaN inputs, or sentinels that have no row."""
    sentinel = dice.maybe(0.5)

    def step(m: Two, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        if bool(torch.isnan(x).any()):
            return m.b(h), 0.9 * h
        if sentinel:
            made = m.table((x[:, 0] > 0).long() * 3)
            new = torch.tanh(made + m.b(h))
        else:
            new = _next(m, x, h)
        return new, new

    case = _two(dice, step)
    case.inputs[torch.rand(case.num_steps) < 0.4] = torch.nan
    return case


def indices(dice: Dice) -> Case:
    """Integer inputs with a sentinel that steps leave out."""

    def step(m: Two, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        if bool((x < 0).any()):
            return m.b(h), 0.9 * h
        new = torch.tanh(m.table(x) + m.b(h))
        return new, new

    case = _two(dice, step)
    case.inputs = torch.randint(6, (case.num_steps, LANES))
    case.inputs[torch.rand(case.num_steps) < 0.4] = -1
    return case


def checkpointed(dice: Dice) -> Case:
    """`torch.utils.checkpoint` inside a step, with as many lanes as features at times."""
    reentrant = dice.maybe(0.3)

    def step(m: Two, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = h + 0 * m.a.bias  # the reentrant form gives no gradient where its input needs none
        inner = checkpoint(lambda v: torch.tanh(m.b(v)), h, use_reentrant=reentrant)
        new = 0.5 * inner + torch.tanh(m.a(x))
        return new, new

    case = _two(dice, step, options={"executor": "replay"})
    if dice.maybe(0.5):
        steps = case.num_steps
        case.inputs, case.targets = torch.randn(2, steps, WIDTH, WIDTH)
        case.start = lambda: torch.zeros(WIDTH, WIDTH)
    return case


def inference(dice: Dice) -> Case:
    """A section under `inference_mode` or `no_grad`."""
    mode = dice.choice((torch.inference_mode, torch.no_grad))

    def step(m: Two, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        with mode():
            z = m.a(x)
        new = torch.tanh(m.b(h) + z.clone())
        return new, new

    return _two(dice, step)


def inner_gradients(dice: Dice) -> Case:
    """Inner gradients of a weight, with and without `retain_graph`, of a detached state."""
    retain = dice.maybe(0.5)

    def step(m: Two, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            error = torch.tanh(m.b(h.detach())).sum()
            (g,) = torch.autograd.grad(error, m.b.weight, retain_graph=retain)
        new = torch.tanh(F.linear(h, m.b.weight - 0.01 * g, m.b.bias) + m.b(h) + m.a(x))
        return new, new

    return _two(dice, step)


def gradients_in_backward(dice: Dice) -> Case:
    """Inner gradients that a hook takes within the backward."""

    def step(m: Two, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        new = _next(m, x, h)
        if new.requires_grad:
            error = torch.tanh(m.b(h.detach())).sum()

            def hook(g: Tensor) -> Tensor:
                (inner,) = torch.autograd.grad(error, m.b.weight, retain_graph=True)
                return g + 0.01 * inner.sum()

            new.register_hook(hook)
        return new, new

    return _two(dice, step, options={"overlap": "refresh"})


def written_row(dice: Dice) -> Case:
    """A write into what a product has used: an error in plain torch, and so one here."""

    def step(m: Two, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        row = m.table((x[:, 0] > 0).long()).detach()
        y = m.a(row)
        new = torch.tanh(y + m.b(h))
        return new + row.mul_(2), new

    case = _two(dice, step)
    case.refused = "plain torch refuses it too"
    return case


def device_context(dice: Dice) -> Case:
    """A device context around the run."""
    case = _two(dice, lambda m, x, h: (_next(m, x, h),) * 2)
    case.around = lambda module: torch.device("cpu")
    return case


def patched(dice: Dice) -> Case:
    """What another library has put on `F.linear` stays, and is called."""

    @contextmanager
    def patch(module: Any) -> Iterator[None]:
        found = F.linear
        F.linear = lambda *given: found(*given) * 1.5
        try:
            yield
        finally:
            F.linear = found

    case = _two(dice, lambda m, x, h: (_next(m, x, h),) * 2)
    case.around = patch
    return case


KINDS = {
    "batch.plain": plain,
    "batch.complex": complex_weights,
    "batch.complex_convolution": complex_convolution,
    "batch.skipped": skipped,
    "batch.indices": indices,
    "batch.checkpointed": checkpointed,
    "batch.inference": inference,
    "batch.inner_gradients": inner_gradients,
    "batch.gradients_in_backward": gradients_in_backward,
    "batch.written_row": written_row,
    "batch.device_context": device_context,
    "batch.patched": patched,
}
