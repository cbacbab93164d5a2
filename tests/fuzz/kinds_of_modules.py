"""Modules that nobody here wrote (kinds of section 6)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .carriers import LANES, WIDTH, Cell, carried, seeded
from .case import Case, Dice
from .labels import PLAIN_STRATEGIES, runs_again


class Growing(nn.Module):
    """Attends over all steps so far."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.cell, self.query = nn.GRUCell(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def start(self) -> Any:
        return torch.zeros(LANES, WIDTH), torch.zeros(1, LANES, WIDTH)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        h, memory = state
        scores = torch.softmax((self.query(h) * memory).sum(-1, keepdim=True), 0)
        h = self.cell(x + (scores * memory).sum(0), h)
        return h, (h, torch.cat([memory, h[None]])[-self.most :])


def growing(dice: Dice) -> Case:
    """A state whose shape changes with time, up to a length or without end."""
    most = dice.choice((99, 4))
    options = {"strategy": dice.choice((dice.strategy(), dice.strategy(), "auto"))}
    return carried(dice, lambda: Growing(most), segment=False, options=options)


class Layer:
    """Holds a tensor, as a layer of a cache does."""

    def __init__(self) -> None:
        self.h: Any = torch.zeros(LANES, WIDTH)


class Cache:
    """Holds layers."""

    def __init__(self) -> None:
        self.layers = [Layer()]


class Cached(nn.Module):
    """Writes into the layers of the cache that it was given, and returns it."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(WIDTH, WIDTH)

    def start(self) -> Any:
        return Cache()

    def forward(self, x: Tensor, cache: Cache) -> tuple[Tensor, Any]:
        h = self.cell(x, cache.layers[0].h)
        cache.layers[0].h = h
        return h, cache


def _runs_again_refused(case: Case, why: str, *names: str) -> Case:
    if runs_again(case) or len(list(case.windows())) > 1:
        case.refused, case.names = why, names
    return case


def nested_objects(dice: Dice) -> Case:
    """A state that is an object of objects with tensors: found at any depth, or refused."""
    case = carried(dice, Cached, segment=False, options={"overlap": "refresh"})
    case.refused, case.names = "the state is an object of objects", ("state",)
    return case


class Attributes(nn.Module):
    """Keeps its state to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.h = nn.GRUCell(WIDTH, WIDTH), None

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        self.h = self.cell(x, torch.zeros(LANES, WIDTH) if self.h is None else self.h)
        return self.h, None


def attribute_state(dice: Dice) -> Case:
    """A state in an attribute of the module: right as one leaf, refused otherwise."""
    options = {"strategy": dice.choice(PLAIN_STRATEGIES), "overlap": "refresh", "loss": "new"}
    case = carried(dice, Attributes, segment=False, options=options)
    case.start = lambda: None
    if dice.maybe(0.3):
        case.k1 = case.k2 = case.num_steps
        case.options["strategy"] = "retain"
    return _runs_again_refused(case, "a state in an attribute of the module", "state", "Attributes")


class Shadow(nn.Module):
    """Returns its state and leaves it in a buffer too, as snntorch does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.decay = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.tensor(0.8))
        self.register_buffer("mem", torch.zeros(LANES, WIDTH))

    def forward(self, x: Tensor, mem: Tensor) -> tuple[Tensor, Tensor]:
        self.mem = mem * self.decay + self.linear(x)
        return torch.tanh(self.mem), self.mem


def shadow_buffer(dice: Dice) -> Case:
    """A buffer that is the returned state."""
    return carried(dice, Shadow, segment=False)


def scriptable() -> nn.Module:
    """A cell of a class of its own: TorchScript shares what it has optimised for a class."""

    class Scriptable(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)

        def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.tanh(self.a(x) + self.b(state))
            return h, h

    return Scriptable(WIDTH)


def scripted(dice: Dice) -> Case:
    """A TorchScript module; the loop runs it as it was, since torch's optimiser errs at times."""
    reference = seeded(dice.torch_seed, scriptable)
    make = lambda: torch.jit.script(scriptable())  # noqa: E731
    return carried(dice, make, segment=False, reference=reference)


class Renormed(nn.Module):
    """Looks rows up that the forward renormalises in place."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, WIDTH, max_norm=0.7)
        self.cell = nn.GRUCell(WIDTH, WIDTH)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        h = self.cell(self.table((x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()), state)
        return h, h


def max_norm(dice: Dice) -> Case:
    """`nn.Embedding(max_norm=)`, whose forward writes its own weights."""
    return carried(dice, Renormed, segment=False, options={"overlap": "refresh"})


class Returning(nn.GRUCell):
    """A subclass of torch's cell that returns output and state."""

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:  # type: ignore[override]
        h = super().forward(x, state)
        return 2 * h, h


def cell_subclass(dice: Dice) -> Case:
    """A subclass of a torch cell with this package's own signature."""
    return carried(dice, lambda: Returning(WIDTH, WIDTH), segment=False)


class Inner(nn.Module):
    """Learns within a step by a gradient; of the state itself, or of a copy cut off from it."""

    def __init__(self) -> None:
        super().__init__()
        self.rate, self.layer = nn.Parameter(torch.tensor(0.1)), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, fast: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            if not fast.requires_grad:
                fast = fast.detach().requires_grad_()
            error = (self.layer(x) * fast - x).pow(2).mean()
            (gradient,) = torch.autograd.grad(error, fast, create_graph=True)
        fast = fast - self.rate * gradient
        return self.layer(x) * fast, fast


def inner_gradient(dice: Dice) -> Case:
    """An inner gradient by the state, under `enable_grad` so that advances can take it too."""
    case = carried(dice, Inner, segment=False, options={"overlap": "refresh"})
    case.start = lambda: torch.ones(LANES, WIDTH)
    return case


class InnerThrough(nn.Module):
    """Takes an inner gradient of a weight through the history of the state."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            error = torch.tanh(self.b(state)).pow(2).sum()
            (g,) = torch.autograd.grad(error, self.b.weight, create_graph=True)
        h = torch.tanh(self.a(x) + torch.nn.functional.linear(state, self.b.weight - 0.1 * g))
        return h, h


def inner_through_history(dice: Dice) -> Case:
    """Inner gradients that reach weights through the undetached state: refused, or retained."""
    options = {"strategy": dice.choice(PLAIN_STRATEGIES), "overlap": "refresh", "loss": "new"}
    window = dice.window(most=4)  # each step differentiates all before, twice over
    case = carried(dice, InnerThrough, segment=False, options=options, window=window)
    if runs_again(case):
        case.refused = "an inner gradient depends on how far back the graph reaches"
        case.names = ("replay", "state", "gradient")
    elif case.options["time_batching"] is True:
        case.refused = "a gradient through a batched product cannot be differentiated again"
        case.names = ("time_batching",)
    return case


class Counting(Cell):
    """Counts its calls, which no result depends on."""

    def __init__(self) -> None:
        super().__init__("lstm")
        self.calls = 0

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        self.calls += 1
        return super().forward(x, state)


def counting(dice: Dice) -> Case:
    """A counter that nothing depends on is nobody's concern."""
    return carried(dice, Counting, segment=False)


KINDS = {
    "modules.growing": growing,
    "modules.nested_objects": nested_objects,
    "modules.attribute_state": attribute_state,
    "modules.shadow_buffer": shadow_buffer,
    "modules.scripted": scripted,
    "modules.max_norm": max_norm,
    "modules.cell_subclass": cell_subclass,
    "modules.inner_gradient": inner_gradient,
    "modules.inner_through_history": inner_through_history,
    "modules.counting": counting,
}
