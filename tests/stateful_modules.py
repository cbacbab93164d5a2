"""Modules that keep their state on themselves, in the ways of libraries and of people.

Each can be given its state by hand (`load`, None is a reset) and asked for it (`store`), which is
what a plain loop needs; nothing else in the tests calls these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from cases import WIDTH, WIDTH_IN
from torch import Tensor, nn


class Stateful(nn.Module):
    """A cell that keeps its state, inside of a module with a readout."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.readout = cell, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.cell(x))

    def load(self, state: Any) -> None:
        self.cell.load(state)

    def store(self) -> Any:
        return self.cell.store()


class Attribute(nn.Module):
    """None at first, as after a reset."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRUCell(WIDTH_IN, WIDTH)
        self.load(None)

    def forward(self, x: Tensor) -> Tensor:
        self.h = self.gru(x, self.h)
        return self.h

    def load(self, state: Any) -> None:
        self.h = state

    def store(self) -> Any:
        return self.h


class Resized(Attribute):
    """A buffer without elements, made anew where the input has another shape, as snnTorch's."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.gru = nn.GRUCell(WIDTH_IN, WIDTH)
        self.register_buffer("h", torch.zeros(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.h.shape[:1] != x.shape[:1]:
            self.h = torch.zeros(x.shape[0], WIDTH, dtype=x.dtype)
        self.fired = (self.h > 0.1).to(x.dtype).detach()  # of this step alone
        self.h = self.gru(x, self.h) - 0.3 * self.fired
        return self.h

    def load(self, state: Any) -> None:
        self.h = torch.zeros(0) if state is None else state


class LazyBuffer(Attribute):
    """Registered in the first step."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.gru = nn.GRUCell(WIDTH_IN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "h"):
            self.register_buffer("h", torch.zeros(x.shape[0], WIDTH, dtype=x.dtype))
        return super().forward(x)

    def load(self, state: Any) -> None:
        if state is not None:
            self.h = state
        elif hasattr(self, "h"):
            del self.h


class LazyAttribute(LazyBuffer):
    """An attribute that there is not before the first step."""

    def forward(self, x: Tensor) -> Tensor:
        self.h = self.gru(x, getattr(self, "h", None))
        return self.h


class InPlace(Attribute):
    """A tensor that each step writes into, of as many lanes as there are."""

    def forward(self, x: Tensor) -> Tensor:
        if self.h is None:
            self.h = torch.zeros(x.shape[0], WIDTH, dtype=x.dtype)
        self.h.copy_(self.gru(x, self.h.clone()))
        return self.h.clone()

    def load(self, state: Any) -> None:
        self.h = None if state is None else state.clone()


class Items(Attribute):
    """Two tensors in a list, written item by item; reset to zero."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTMCell(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h, c = self.h
        zero = x.new_zeros(x.shape[0], WIDTH)
        self.h[0], self.h[1] = self.lstm(self.gru(x), (zero + h, zero + c))
        return self.h[0]

    def load(self, state: Any) -> None:
        self.h = [torch.zeros(1, 1), torch.zeros(1, 1)] if state is None else list(state)

    def store(self) -> Any:
        return list(self.h)


class Memories(Attribute):
    """A number in a dict that becomes a tensor, found by `__getattr__`, as SpikingJelly's."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.gru, self.memories = nn.GRUCell(WIDTH_IN, WIDTH), {"v": 0.0}

    def __getattr__(self, name: str) -> Any:
        memories = vars(self).get("memories", {})
        return memories[name] if name in memories else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self).get("memories", {}):
            self.memories[name] = value
        else:
            super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.v, float):
            self.v = torch.full((x.shape[0], WIDTH), self.v, dtype=x.dtype)
        self.v = self.gru(x, self.v)
        spike = (self.v > 0.2).to(x.dtype)
        self.v = self.v - 0.5 * spike.detach()
        return self.v + spike

    def load(self, state: Any) -> None:
        self.v = 0.0 if state is None else state["v"]

    def store(self) -> Any:
        return {"v": self.v}


class Pair(NamedTuple):
    h: Tensor
    c: Tensor


@dataclass
class Record:
    pair: Pair | None


class Nested(Attribute):
    """A named tuple inside of a dataclass, replaced as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTMCell(WIDTH_IN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        self.h = Record(Pair(*self.lstm(x, self.h.pair)))
        return self.h.pair.h

    def load(self, state: Any) -> None:
        self.h = Record(None if state is None else Pair(*state))

    def store(self) -> Any:
        return tuple(self.h.pair)


class Flagged(Attribute):
    """A flag says whether the state was made, for each sequence once."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_made:
            self.h, self.is_made = torch.zeros(x.shape[0], WIDTH, dtype=x.dtype), True
        return super().forward(x)

    def load(self, state: Any) -> None:
        self.h, self.is_made = state, state is not None


class Delayed(Attribute):
    """What a step leaves is read two steps later; nothing is computed where it moves on."""

    def forward(self, x: Tensor) -> Tensor:
        new = self.gru(x, self.before)
        self.before, self.h = self.h, new
        return new

    def load(self, state: Any) -> None:
        zero = torch.zeros(2, WIDTH, dtype=torch.float64)
        self.before, self.h = (zero, zero) if state is None else state

    def store(self) -> Any:
        return self.before, self.h


class Logging(Attribute):
    """Graphs that nobody reads: of the last step, and of all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.history = None, []

    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)
        self.seen = h * 2
        self.history.append(h.sum())
        return h


class Normalised(Attribute):
    """Running statistics are no state."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH_IN)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


class Dropping(Attribute):
    """Random numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.4)


class Frozen(Attribute):
    """A state that depends on the inputs alone."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.new_zeros(1, 1) if self.h is None else self.h
        self.h = 0.9 * mean + x.sum(1, keepdim=True)
        return self.gru(x) * self.h


KINDS = (
    *(Attribute, Resized, LazyBuffer, LazyAttribute, InPlace, Items, Memories, Nested, Flagged),
    *(Delayed, Logging, Normalised, Dropping, Frozen),
)


def stateful(kind: type[Any]) -> Stateful:
    torch.manual_seed(0)
    made = Stateful(kind()).double()
    made.load(None)  # tensors that are no buffers are not converted
    return made
