"""Models made of torch alone: its layers, and cells as people write them around these."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel

from benchmarks.models.model import LANES, WIDTH, WIDTH_IN, Model, Wrapped


def zeros(*shape: int) -> Tensor:
    """A part of a first state, of torch's default type."""
    return torch.zeros(LANES, *(shape or (WIDTH,)))


class Bidirectional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH_IN, WIDTH, bidirectional=True)
        self.readout = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, state: Any) -> Any:
        y, state = self.lstm(x, state)
        return self.readout(y), state


class StepByStep(Wrapped):
    """A layer that is called with one step at a time."""

    def forward(self, x: Tensor, state: Any) -> Any:
        y, state = self.inner(x[None], state)
        return y[0], state


class Cell(nn.Module):
    """A cell of torch's, with a readout."""

    def __init__(self, cell: nn.Module | None = None) -> None:
        super().__init__()
        self.cell = nn.GRUCell(WIDTH_IN, WIDTH) if cell is None else cell
        self.readout = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, state: Any) -> Any:
        state = self.cell(x, state)
        return self.readout(state[0] if isinstance(state, tuple) else state), state


class Normed(nn.Module):
    """An LSTM with layer norms and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.of_x = nn.Linear(WIDTH_IN, 4 * WIDTH)
        self.of_h = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.norms = nn.ModuleList(nn.LayerNorm(n) for n in (4 * WIDTH, 4 * WIDTH, WIDTH))
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor, state: Any) -> Any:
        h, c = state
        gates = self.norms[0](self.of_x(x)) + self.norms[1](self.of_h(h))
        i, f, g, o = gates.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * self.dropout(g.tanh())
        h = o.sigmoid() * torch.tanh(self.norms[2](c))
        return h, (h, c)


class BatchNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.cell = nn.BatchNorm1d(WIDTH_IN), nn.GRUCell(WIDTH_IN, WIDTH)

    def forward(self, x: Tensor, h: Tensor) -> Any:
        h = self.cell(self.norm(x), h)
        return h, h


class Tied(nn.Module):
    """One weight in the transition and the readout; a bias is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.of_x, self.of_h = nn.Linear(WIDTH_IN, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.readout = nn.Linear(WIDTH, WIDTH)
        self.readout.weight = self.of_h.weight
        self.of_x.bias.requires_grad_(False)

    def forward(self, x: Tensor, h: Tensor) -> Any:
        h = torch.tanh(self.of_x(x) + self.of_h(h))
        return self.readout(h), h


class Stacked(nn.Module):
    """A state that is a list."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.ModuleList([nn.GRUCell(WIDTH_IN, WIDTH), nn.GRUCell(WIDTH, WIDTH)])

    def forward(self, x: Tensor, state: list[Tensor]) -> Any:
        new = []
        for cell, h in zip(self.cells, state, strict=True):
            x = cell(x, h)
            new.append(x)
        return x, new


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, WIDTH_IN, sparse=True)
        self.cell, self.readout = nn.LSTMCell(WIDTH_IN, WIDTH), nn.Linear(WIDTH, 11)

    def forward(self, x: Tensor, state: Any) -> Any:
        state = self.cell(self.embedding(x), state)
        return self.readout(state[0]), state


class Hyper(nn.Module):
    """Weights that are computed in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.scale = nn.GRUCell(WIDTH_IN, WIDTH), nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, h: Tensor) -> Any:
        weights = {name: self.scale * w for name, w in self.cell.named_parameters()}
        h = torch.func.functional_call(self.cell, weights, (x, h))
        return h, h


class EchoState(nn.Module):
    """A fixed reservoir in buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("of_x", torch.randn(WIDTH_IN, 20))
        self.register_buffer("of_h", 0.2 * torch.randn(20, 20))
        self.readout = nn.Linear(20, WIDTH)

    def forward(self, x: Tensor, h: Tensor) -> Any:
        h = torch.tanh(x @ self.of_x + h @ self.of_h)
        return self.readout(h), h


class Automaton(nn.Module):
    """A neural cellular automaton, whose cells are updated at random."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = nn.Conv2d(6, 12, 3, padding=1, groups=6)
        self.rule = nn.Sequential(nn.Conv2d(12, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 1))

    def forward(self, x: Tensor, grid: Tensor) -> Any:
        chosen = torch.rand(grid.shape[0], 1, 6, 6) < 0.5
        grid = grid + 0.1 * self.rule(self.seen(grid)) * chosen + 0.01 * x.mean()
        return grid[:, 0].flatten(1)[:, :WIDTH], grid


class Attention(nn.Module):
    """Attention over the last keys, or over all of them."""

    def __init__(self, keys: int | None) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(WIDTH_IN, 8) for _ in range(3))
        self.readout, self.keys = nn.Linear(8, WIDTH), keys

    def forward(self, x: Tensor, state: dict[str, Tensor]) -> Any:
        q, k, v = (each(x)[:, None] for each in self.maps)
        kept = -self.keys if self.keys else None
        k = torch.cat([state["k"], k], 1)[:, kept:]
        v = torch.cat([state["v"], v], 1)[:, kept:]
        y = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return self.readout(y), {"k": k, "v": v}


class KeptState(nn.Module):
    """A state in an attribute, which is not given and not returned."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.h = nn.GRUCell(WIDTH_IN, WIDTH), None

    def forward(self, x: Tensor, state: Any) -> Any:
        self.h = self.cell(x, self.h)
        return self.h, state


class KeptStateByHand(Wrapped):
    def forward(self, x: Tensor, state: Any) -> Any:
        self.inner.h = state
        return self.inner(x, None)[0], self.inner.h


def hooked() -> nn.Module:
    """Hooks on modules and on a weight."""
    cell = Tied()
    cell.register_forward_hook(lambda _m, _x, result: (2 * result[0], result[1]))
    cell.readout.register_full_backward_pre_hook(lambda _m, grads: tuple(2 * g for g in grads))
    cell.of_x.weight.register_hook(lambda grad: 3 * grad)
    return cell


def compiled() -> nn.Module:
    """A step that is compiled, by the backend that needs no compiler."""
    cell = Tied()
    cell.compile(backend="aot_eager")
    return cell


def normed_weight(normed: Any, cell: nn.Module, name: str) -> nn.Module:
    """A cell or layer with a weight that is computed."""
    normed(cell, name)
    return cell


def keys(count: int) -> dict[str, Tensor]:
    """An attention's first keys and values."""
    return {"k": torch.randn(LANES, count, 8), "v": torch.randn(LANES, count, 8)}


MODELS = [
    Model(name="nn.LSTMCell", make=lambda: nn.LSTMCell(WIDTH_IN, WIDTH)),
    Model(name="nn.GRUCell, no lanes", make=lambda: nn.GRUCell(WIDTH_IN, WIDTH), lanes=0),
    Model(name="nn.LSTM, 2 layers", make=lambda: nn.LSTM(WIDTH_IN, WIDTH, 2)),
    Model(
        name="nn.LSTM, proj_size, 2 layers",
        make=lambda: nn.LSTM(WIDTH_IN, WIDTH, 2, proj_size=3),
        width=3,
    ),
    Model(
        name="nn.LSTM, batch_first",
        make=lambda: nn.LSTM(WIDTH_IN, WIDTH, batch_first=True),
        time_dim=1,
    ),
    Model(name="nn.LSTM, no lanes", make=lambda: nn.LSTM(WIDTH_IN, WIDTH), lanes=0),
    Model(name="nn.GRU without bias", make=lambda: nn.GRU(WIDTH_IN, WIDTH, bias=False)),
    Model(name="nn.RNN, relu", make=lambda: nn.RNN(WIDTH_IN, WIDTH, nonlinearity="relu")),
    Model(
        name="nn.LSTM, 3 layers, dropout",
        make=lambda: nn.LSTM(WIDTH_IN, WIDTH, 3, dropout=0.3),
        plain_steps=lambda: StepByStep(nn.LSTM(WIDTH_IN, WIDTH, 3, dropout=0.3)),
        note="its numbers follow its cuts, which must be alike",
    ),
    Model(
        name="nn.LSTM, bidirectional",
        make=lambda: nn.LSTM(WIDTH_IN, WIDTH, bidirectional=True),
        width=2 * WIDTH,
    ),
    Model(name="nn.LSTM, bidirectional, in a module", make=Bidirectional, per_step=False),
    Model(
        name="AveragedModel(nn.LSTM)",
        make=lambda: AveragedModel(nn.LSTM(WIDTH_IN, WIDTH)),
        plain=lambda: nn.LSTM(WIDTH_IN, WIDTH),
    ),
    Model(
        name="nn.RNNCell, spectral_norm",
        make=lambda: Cell(
            normed_weight(parametrizations.spectral_norm, nn.RNNCell(WIDTH_IN, WIDTH), "weight_hh")
        ),
        state=zeros,
    ),
    Model(
        name="nn.RNNCell, orthogonal",
        make=lambda: Cell(
            normed_weight(parametrizations.orthogonal, nn.RNNCell(WIDTH_IN, WIDTH), "weight_hh")
        ),
        state=zeros,
    ),
    Model(
        name="nn.LSTM, weight_norm",
        make=lambda: normed_weight(
            parametrizations.weight_norm, nn.LSTM(WIDTH_IN, WIDTH), "weight_hh_l0"
        ),
    ),
    Model(name="LSTM with layer norms and dropout", make=Normed, state=lambda: (zeros(), zeros())),
    Model(name="BatchNorm before a cell", make=BatchNormed, state=zeros),
    Model(name="weights tied, some frozen", make=Tied, state=zeros),
    Model(name="cells in a ModuleList", make=Stacked, state=lambda: [zeros(), zeros()]),
    Model(name="sparse embedding, LSTMCell", make=Embedded, tokens=11),
    Model(name="weights computed in the step", make=Hyper, state=zeros),
    Model(name="hooks on modules and weights", make=hooked, state=zeros),
    Model(name="module.compile(), aot_eager", make=compiled, plain=Tied, state=zeros),
    Model(name="echo state network", make=EchoState, state=lambda: zeros(20)),
    Model(
        name="neural cellular automaton, random updates",
        make=Automaton,
        state=lambda: zeros(6, 6, 6) + 1,
    ),
    Model(name="attention over the last 6 keys", make=lambda: Attention(6), state=lambda: keys(6)),
    Model(
        name="attention over all keys",
        make=lambda: Attention(None),
        state=lambda: keys(1),
        note="a budget is not looked at: the state grows",
    ),
    Model(name="state in an attribute", make=KeptState, plain=lambda: KeptStateByHand(KeptState())),
]
