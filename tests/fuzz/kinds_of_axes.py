"""Which axis is time, what owns the weights, what a module takes (kinds of section 5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.optim.swa_utils import AveragedModel

from tbptt_ckpt import TBPTT, TensorSequence

from .carriers import LANES, WIDTH, Cell, Segments, carried, seeded
from .case import Case, Dice


def _asked(case: Case, dice: Dice, data: Any = None, **further: Any) -> Case:
    """Runs a case that must be refused, with what `further` changes of it."""

    def run() -> Any:
        module = case.make()
        optimizer = further.get("optimizer", torch.optim.SGD)
        made = optimizer(module.parameters(), 0.05)
        tbptt = TBPTT(module, case.loss.function, case.k1, case.k2, made, **case.options)
        given = TensorSequence(case.inputs, case.targets) if data is None else data(case)
        return list(tbptt.windows(given, case.start()))

    case.run = run
    return case


def holds_rnn(dice: Dice) -> Case:
    """An own module around nn.LSTM: right where `per_step` is said, refused where it is not."""
    case = carried(dice, lambda: Segments("nn.LSTM"), segment=True)
    if dice.maybe(0.4):
        del case.options["per_step"]
        case.refused, case.names = "a module that contains nn.LSTM must say per_step", ("per_step",)
    return case


class StepOfFused(nn.Module):
    """One step through a fused layer, by unsqueezing."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(WIDTH, WIDTH)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = self.layer(x[None], state)
        return y[0], state


def unsqueezes(dice: Dice) -> Case:
    """A step that unsqueezes for a fused layer, and says so."""
    case = carried(dice, StepOfFused, segment=False, options={"per_step": True})
    case.start = lambda: torch.zeros(1, LANES, WIDTH)
    return case


def recognised(dice: Dice) -> Case:
    """`nn.RNN/LSTM/GRU` and their cells as they are."""
    if dice.maybe(0.5):
        kind = dice.choice((nn.GRUCell, nn.RNNCell))

        def call(module: Any, x: Tensor, state: Any) -> tuple[Tensor, Any]:
            h = module(x, state)
            return h, h

        return carried(dice, lambda: kind(WIDTH, WIDTH), segment=False, call=call)
    return _fused(dice)


def _fused(dice: Dice, wrap: Callable[[nn.Module], nn.Module] | None = None, **given: Any) -> Case:
    kind = dice.choice((nn.LSTM, nn.GRU, nn.RNN))
    made = wrap or (lambda module: module)
    case = carried(dice, lambda: made(kind(WIDTH, WIDTH, **given)), segment=True)
    case.start = lambda: None
    del case.options["per_step"]
    return case


def batch_first(dice: Dice) -> Case:
    """`batch_first=True`: a source that says nothing follows, time first is turned where said."""
    case = _fused(dice, batch_first=True)
    if dice.maybe(0.2):
        case.source = "tensors"

        def call(module: Any, x: Tensor, state: Any) -> tuple[Tensor, Any]:
            y, state = module(x.transpose(0, 1), state)
            return y.transpose(0, 1), state

        case.call = call
        return case
    case.inputs = case.inputs.transpose(0, 1).contiguous()
    case.targets = case.targets.transpose(0, 1).contiguous()
    case.time_dim, case.source = 1, dice.choice(("unsaid", "tensors", "tensors"))
    if dice.maybe(0.3):
        case.options["time_dim"] = 0
        case.refused = "TBPTT is told another time dimension than batch_first"
        case.names = ("time_dim", "batch_first")
    return case


def bidirectional(dice: Dice) -> Case:
    """A bidirectional layer, given directly or inside an own module."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.GRU(WIDTH, WIDTH // 2, bidirectional=True)

        def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
            return self.layer(x, state)

    direct = dice.maybe(0.3)
    make = (lambda: nn.GRU(WIDTH, WIDTH // 2, bidirectional=True)) if direct else Both
    case = carried(dice, make, segment=True)
    case.start, case.refused = lambda: None, "a bidirectional layer reads what is to come"
    case.names = ("bidirectional",)
    if direct:
        del case.options["per_step"]
    return _asked(case, dice)


def wrapped(dice: Dice) -> Case:
    """What is an nn.LSTM through wrappers."""
    return _fused(dice, dice.choice((nn.DataParallel, AveragedModel)))


def wrapped_cell(dice: Dice) -> Case:
    """What is an nn.LSTMCell or nn.GRUCell through a wrapper."""
    kind = dice.choice((nn.LSTMCell, nn.GRUCell))
    wrap = dice.choice((nn.DataParallel, AveragedModel))

    def call(module: Any, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        new = module(x, state)
        return (new[0] if isinstance(new, tuple) else new), new

    def start() -> Any:
        zeros = torch.zeros(LANES, WIDTH)
        return (zeros, zeros.clone()) if kind is nn.LSTMCell else zeros

    return carried(dice, lambda: wrap(kind(WIDTH, WIDTH)), segment=False, call=call, start=start)


def other_optimizer(dice: Dice) -> Case:
    """An optimizer that holds none of the module's parameters."""
    case = carried(dice)
    case.refused, case.names = "the optimizer holds another module's weights", ("optimizer",)
    other = seeded(1, lambda: nn.Linear(2, 2))
    return _asked(case, dice, optimizer=lambda _, lr: torch.optim.SGD(other().parameters(), lr))


class NoState(nn.Module):
    """Takes no state at all."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def misused(dice: Dice) -> Case:
    """No state where one is needed, packed sequences, loaders of batches."""
    case = carried(dice, lambda: Cell("rnn"), segment=False, source="tensors")
    way = dice.choice(("no init_state", "no state", "packed", "loader"))
    case.refused = way
    if way == "no init_state":
        case.start, case.names = lambda: None, ("init_state",)
        return _asked(case, dice)
    if way == "no state":
        case.make, case.names = seeded(1, NoState), ("state",)
        return _asked(case, dice)
    if way == "packed":
        case.names = ("PackedSequence", "LaneSource")
        return _asked(case, dice, lambda c: pack_sequence(list(c.inputs.unbind(1))))
    case.names = ("DataLoader", "LaneSource")

    def loader(case: Case) -> Any:
        data = torch.utils.data.TensorDataset(case.inputs, case.targets)
        return torch.utils.data.DataLoader(data, batch_size=2)

    return _asked(case, dice, loader)


class Gained(Cell):
    """Returns an output with a dimension more than its targets."""

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = super().forward(x, state)
        return y[None], state


def shapes(dice: Dice) -> Case:
    """Outputs and targets that do not belong together, which broadcasting would hide."""
    if dice.maybe(0.5):
        case = carried(dice, lambda: Gained("gru"), segment=False, source="tensors")
        case.refused, case.names = "the output gained a dimension", ("output", "dimension")
        return _asked(case, dice)
    case = carried(dice, lambda: Cell("gru"), segment=False, source="tensors")
    case.targets = case.targets[:, :1]
    case.refused, case.names = "targets have one lane, outputs have three", ("target", "lane")
    return _asked(case, dice)


KINDS = {
    "axes.holds_rnn": holds_rnn,
    "axes.unsqueezes": unsqueezes,
    "axes.recognised": recognised,
    "axes.batch_first": batch_first,
    "axes.bidirectional": bidirectional,
    "axes.wrapped": wrapped,
    "axes.wrapped_cell": wrapped_cell,
    "axes.other_optimizer": other_optimizer,
    "axes.misused": misused,
    "axes.shapes": shapes,
}
