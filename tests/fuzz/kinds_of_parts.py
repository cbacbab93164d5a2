"""Steps whose parts are declared or found, around cells and layers of torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tbptt_ckpt import Recurrent

from .carriers import LANES, WIDTH, carried, seeded
from .case import Case, Dice
from .kinds_of_losses import CLASSES, classified, cross_entropy, padded, pair_loss

CELLS = (nn.LSTMCell, nn.GRUCell, nn.RNNCell)
LAYERS = (nn.LSTM, nn.GRU, nn.RNN)


def long_window(dice: Dice) -> dict[str, Any]:
    """Windows of which some have the 32 steps from which parts that are found are used."""
    k1 = dice.choice((3, 8, 17, 33))
    k2 = dice.choice((k1, k1 + dice.randint(1, 20), 35, 40, max(1, k1 // 2), None))
    return {"steps": dice.randint(36, 60), "k1": k1, "k2": k2}


def _case(dice: Dice, make: Callable[[int], nn.Module], segment: bool, **given: Any) -> Case:
    """A case with one of several losses; `make` is told how many outputs that one wants."""
    options = {
        "strategy": dice.choice((dice.strategy(), "uniform:8", "uniform:17", "retain")),
        "executor": dice.choice(("replay", "replay", "replay", "checkpoint")),
        "time_batching": dice.choice(("auto", "auto", True, False)),
    }
    if not segment and dice.maybe(0.02):
        options |= {"compile": "aot_eager", "executor": "replay", "strategy": "uniform:32"}
    given = {"window": long_window(dice), "segment": segment, "options": options, **given}
    way = dice.choice(("mse", "classes", "padded", "pair"))
    if way in ("mse", "pair"):
        further = {"loss": pair_loss(masked=dice.maybe(0.5))} if way == "pair" else {}
        return carried(dice, lambda: make(WIDTH), **further, **given)
    case = classified(dice, cross_entropy(dice), make=lambda: make(CLASSES), **given)
    return padded(case, dice, 0.3) if way == "padded" else case


def first_state(kind: type[nn.Module]) -> Callable[[], Any]:
    shape = (1, LANES, WIDTH) if kind in LAYERS else (LANES, WIDTH)

    def start() -> Any:
        zeros = torch.zeros(shape)
        return (zeros, zeros.clone()) if kind in (nn.LSTM, nn.LSTMCell) else zeros

    return start


class Transition(nn.Module):
    """A transition of nobody's kind, whose features are not its state."""

    def __init__(self, *_: int) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, encoded: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.norm(self.inner(state) + encoded))
        return 2 * h, h


class Part(nn.Module):
    """A layer, with lanes by themselves or mixed, or with dropout."""

    def __init__(self, form: str, outputs: int = WIDTH) -> None:
        super().__init__()
        self.form, self.layer = form, nn.Linear(WIDTH, outputs)

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "mixes":
            return self.layer(x - x.mean(0, keepdim=True))
        if self.form == "drops":
            return F.dropout(self.layer(x), 0.3)
        return torch.tanh(self.layer(x)) if self.form == "bent" else self.layer(x)


class Whole(nn.Module):
    """What `Recurrent` is to be: its parts one after the other, in every step."""

    def __init__(self, transition: nn.Module, encode: Any, readout: Any) -> None:
        super().__init__()
        self.transition, self.encode, self.readout = transition, encode, readout

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        is_layer = isinstance(self.transition, LAYERS)
        x = x[0] if is_layer else x
        x = x if self.encode is None else self.encode(x)
        found = self.transition(x[None] if is_layer else x, state)
        if isinstance(self.transition, CELLS):
            found = (found[0], found) if isinstance(found, tuple) else (found, found)
        y = found[0][0] if is_layer else found[0]
        y = y if self.readout is None else self.readout(y)
        return y[None] if is_layer else y, found[1]


def _declared(dice: Dice, kinds: tuple[type[nn.Module], ...]) -> Case:
    kind = dice.choice(kinds)
    forms: tuple[Any, ...] = ("plain", "bent", "plain", "bent", "mixes")
    if kinds is not LAYERS:  # one call of several steps may draw other numbers than several
        forms = (*forms, "drops")
    encode, readout = dice.choice((*forms, None)), dice.choice(forms)

    def parts(outputs: int) -> tuple[Any, Any, Any]:
        return kind(WIDTH, WIDTH), encode and Part(encode), Part(readout, outputs)

    made = _case(dice, lambda outputs: Recurrent(*parts(outputs)), kind in LAYERS)
    outputs = made.make().readout.layer.out_features
    made.options.pop("per_step", None)
    made.start = first_state(kind)
    made.reference = seeded(0, lambda: _alike(Whole(*parts(outputs)), made.make()))
    return made


def _alike(module: nn.Module, other: nn.Module) -> nn.Module:
    module.load_state_dict(other.state_dict())
    return module


def declared(dice: Dice) -> Case:
    """`Recurrent` around a cell of torch's or a transition of one's own."""
    return _declared(dice, (*CELLS, Transition))


def declared_layer(dice: Dice) -> Case:
    """`Recurrent` around `nn.RNN/LSTM/GRU`, whose parts see lanes folded over time."""
    return _declared(dice, LAYERS)


class Step(nn.Module):
    """A step in one `forward`, around a cell of torch's; what is around it says a subclass."""

    def __init__(self, kind: type[nn.Module], outputs: int) -> None:
        super().__init__()
        self.cell, self.norm = kind(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, outputs)


class Plain(Step):
    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        new = self.cell(torch.tanh(self.first(x)), state)
        h = new[0] if isinstance(new, tuple) else new
        return self.last(self.norm(h)), new


class LooksBack(Step):
    """Its readout looks at the input and the old state."""

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        e = torch.relu(self.first(x))
        new = self.cell(e, state)
        h = new[0] if isinstance(new, tuple) else new
        old = state[0] if isinstance(state, tuple) else state
        return self.last(h * torch.sigmoid(e) + old), new


class MixesBefore(Step):
    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        new = self.cell(self.first(x - x.mean(0, keepdim=True)), state)
        h = new[0] if isinstance(new, tuple) else new
        return self.last(h), new


class MixesAfter(Step):
    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        new = self.cell(self.first(x), state)
        h = new[0] if isinstance(new, tuple) else new
        return self.last(h) - torch.softmax(self.last(h), 0), new


class Residual(Step):
    """Changes the state after the cell."""

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        e = self.first(x)
        new = self.cell(e, state)
        new = (new[0] + 0.1 * e, new[1]) if isinstance(new, tuple) else new + 0.1 * e
        h = new[0] if isinstance(new, tuple) else new
        return self.last(h), new


class Counts(Step):
    """Uses the number of lanes as a number."""

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        new = self.cell(self.first(x) / x.shape[0], state)
        h = new[0] if isinstance(new, tuple) else new
        return self.last(h) * x.size(0) + torch.arange(x.shape[0]).unsqueeze(1), new


class Norms(Step):
    """Norms of all lanes together."""

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        new = self.cell(self.first(x / x.norm()), state)
        h = new[0] if isinstance(new, tuple) else new
        return self.last(h) / (1 + self.last(h).abs().max()), new


class Transposes(Step):
    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        e = torch.einsum("bf,hf->bh", x, self.first.weight) + self.first.bias
        new = self.cell(e, state)
        h = new[0] if isinstance(new, tuple) else new
        return (self.last.weight @ h.T).T + h.T.flatten().view(WIDTH, -1).T[:, :1], new


class Orders(Step):
    """Sums and sorts over lanes."""

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        new = self.cell(self.first(torch.where(x > 0, x, 0.1 * x)).cumsum(0), state)
        h = new[0] if isinstance(new, tuple) else new
        return self.last(h).sort(0).values, new


class Tied(Step):
    """Its readout has weights of the encoder, and a part of it no gradient."""

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        new = self.cell(self.first(x), state)
        h = new[0] if isinstance(new, tuple) else new
        return self.last(h @ self.first.weight.T) + self.last(h.detach()), new


class DropsAround(Step):
    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        new = self.cell(F.dropout(self.first(x), 0.3), state)
        h = new[0] if isinstance(new, tuple) else new
        return self.last(F.dropout(h, 0.2)), new


class DropsInside(Step):
    """Draws what becomes part of the state."""

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        new = self.cell(torch.tanh(self.first(x)), state)
        new = (F.dropout(new[0], 0.2), new[1]) if isinstance(new, tuple) else F.dropout(new, 0.2)
        h = new[0] if isinstance(new, tuple) else new
        return self.last(h), new


STEPS = (Plain, LooksBack, MixesBefore, MixesAfter, Residual, Counts, Norms, Transposes, Orders)
STEPS += (Tied, DropsAround, DropsInside, Plain, LooksBack, Tied)


def found(dice: Dice) -> Case:
    """A step of one's own around a cell, whose parts a trace finds, or rightly does not."""
    step, kind = dice.choice(STEPS), dice.choice(CELLS)
    made = _case(dice, lambda outputs: step(kind, outputs), segment=False)
    made.start = first_state(kind)
    return made


KINDS = {
    "parts.declared": declared,
    "parts.declared_layer": declared_layer,
    "parts.found": found,
}
