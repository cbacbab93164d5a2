"""Steps that are written as one forward, for tests of the parts that a trace finds."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from cases import WIDTH, WIDTH_IN, random_state
from torch import Tensor, nn


class Language(nn.Module):
    """Encoder, LSTMCell, norm and readout, as most would write them."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.cell = nn.Linear(WIDTH_IN, WIDTH), nn.LSTMCell(WIDTH, WIDTH)
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scale = 1.0

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        if state is None:
            state = (x.new_zeros(len(x), WIDTH),) * 2
        h, c = self.cell(torch.tanh(self.encode(x)), state)
        return self.out(torch.tanh(self.norm(h))) * self.scale, (h, c)


class InDict(Language):
    """Its state is a dict in another order, and its readout looks back at the input."""

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        encoded = self.encode(x)
        h, c = self.cell(encoded, (state["h"], state["c"]))
        return self.out(self.norm(h) + encoded), {"c": c, "h": h}


class Gated(nn.Module):
    """No cell of torch's, whose steps are left as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.gate = nn.Linear(WIDTH_IN, WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.new, self.out = nn.Linear(2 * WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([self.encode(x), h], 1)
        z = torch.sigmoid(self.gate(both))
        h = z * h + (1 - z) * torch.tanh(F.linear(both, self.new.weight, self.new.bias))
        return torch.softmax(self.out(h), -1), h


class Single(Language):
    """A cell with one state, and an encoder that its readout sees too."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor, h: Any) -> tuple[Tensor, Any]:
        if h is None:
            h = x.new_zeros(len(x), WIDTH)
        encoded = self.encode(x)
        h = self.cell(encoded, h)
        return self.out(self.norm(h) + encoded), h


class InTuple(Single):
    """The same, whose state is a tuple of one."""

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, h = super().forward(x, state[0])
        return y, (h,)


class Mixing(Language):
    """Its readout knows of other lanes, so that it is part of the transition."""

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        h, c = self.cell(self.encode(x), state)
        return self.out(h - h.mean(0)), (h, c)


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "language": (Language, lambda: (random_state(2), random_state(3))),
    "from none": (Language, lambda: None),
    "in a dict": (InDict, lambda: {"c": random_state(3), "h": random_state(2)}),
    "gru": (lambda: Single(nn.GRUCell(WIDTH, WIDTH)), lambda: random_state(2)),
    "gru from none": (lambda: Single(nn.GRUCell(WIDTH, WIDTH, bias=False)), lambda: None),
    "rnn": (lambda: InTuple(nn.RNNCell(WIDTH, WIDTH)), lambda: (random_state(2),)),
    "relu": (
        lambda: Single(nn.RNNCell(WIDTH, WIDTH, nonlinearity="relu")),
        lambda: random_state(2),
    ),
    "gated": (Gated, lambda: random_state(2)),
    "mixing": (Mixing, lambda: (random_state(2), random_state(3))),
}


def made(kind: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    make, begin = KINDS[kind]
    return make().double(), begin()
