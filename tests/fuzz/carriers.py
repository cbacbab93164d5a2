"""Random recurrent modules, and the losses of their outputs: what each kind's twist is put on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import Case, Dice, Loss

LANES, WIDTH = 3, 4
CELLS = ("rnn", "gru", "lstm", "deep", "normed", "named")
MSE = Loss(
    function=F.mse_loss, total=lambda y, t: (y - t).pow(2).sum(), count=lambda y, t: y.numel()
)


class Cell(nn.Module):
    """One step: a recurrent core in one of several forms, and a readout."""

    def __init__(self, form: str, outputs: int = WIDTH) -> None:
        super().__init__()
        self.form = form
        self.first = nn.Linear(WIDTH, WIDTH)
        self.core = nn.LSTMCell(WIDTH, WIDTH) if form == "lstm" else nn.GRUCell(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.readout = nn.Linear(WIDTH, outputs)
        if form == "rnn":
            self.core = nn.Linear(WIDTH, WIDTH)

    def start(self) -> Any:
        zeros = torch.zeros(LANES, WIDTH)
        if self.form == "lstm":
            return (zeros, zeros.clone())
        if self.form == "deep":
            return [zeros, {"inner": zeros.clone()}]
        return {"h": zeros} if self.form == "named" else zeros

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        if self.form == "lstm":
            state = self.core(torch.tanh(self.first(x)), state)
            return self.readout(state[0]), state
        if self.form == "rnn":
            h = torch.tanh(self.first(x) + self.core(state))
            return self.readout(h), h
        if self.form == "deep":
            h = self.core(x, state[0])
            inner = torch.tanh(self.second(h) + 0.5 * state[1]["inner"])
            return self.readout(inner), [h, {"inner": inner}]
        h = self.core(self.first(x), state["h"] if self.form == "named" else state)
        if self.form == "normed":
            h = self.norm(h)
        return self.readout(h), {"h": h} if self.form == "named" else h


class Segments(nn.Module):
    """A segment: a fused layer and a readout, or a cell in a loop over the first dimension."""

    def __init__(self, form: str, outputs: int = WIDTH) -> None:
        super().__init__()
        fused = {"nn.LSTM": nn.LSTM, "nn.GRU": nn.GRU, "nn.RNN": nn.RNN}
        self.layer = fused[form](WIDTH, WIDTH) if form in fused else None
        self.cell = Cell("gru", outputs)
        self.form = form

    def start(self) -> Any:
        zeros = torch.zeros(1, LANES, WIDTH)
        if self.form == "loop":
            return zeros[0]
        return (zeros, zeros.clone()) if self.form == "nn.LSTM" else zeros

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        if self.layer is not None:
            y, state = self.layer(x, state)
            return self.cell.readout(y), state
        outputs = []
        for step in x:
            y, state = self.cell(step, state)
            outputs.append(y)
        return torch.stack(outputs), state


def seeded(seed: int, make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """The module in float64, with the same weights every time, whatever was drawn before."""

    def build() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return make()

    return build


def carried(
    dice: Dice,
    make: Callable[[], nn.Module] | None = None,
    *,
    loss: Loss | None = None,
    outputs: int = WIDTH,
    segment: bool | None = None,
    classes: bool = False,
    **given: Any,
) -> Case:
    """A legal case with a random carrier, unless another module is given."""
    segment = (make is None and dice.maybe(0.4)) if segment is None else segment
    if make is None:
        form = dice.choice(("nn.LSTM", "nn.GRU", "nn.RNN", "loop") if segment else CELLS)
        kind = Segments if segment else Cell
        make = lambda: kind(form, outputs)  # noqa: E731
    make = seeded(dice.torch_seed, make)
    window = given.pop("window", None) or dice.window()
    steps = window["steps"]
    x = torch.randn(steps, LANES, WIDTH)
    targets = torch.randn(steps, LANES, outputs)
    if classes:
        targets = torch.randint(outputs, (steps, LANES))
    example = make()
    options = dice.options(**given.pop("options", {}))
    if segment:
        options.setdefault("per_step", False)
    reader = dice.choice(("tensors", "tensors", "reader", "stream"))
    if options["overlap"] == "stale" and reader == "stream":
        reader = "reader"  # a short last window of a stream starts elsewhere, as documented
    return Case(
        **{
            "make": make,
            "loss": loss or MSE,
            "inputs": x,
            "targets": targets,
            "k1": window["k1"],
            "k2": window["k2"],
            "start": getattr(example, "start", lambda: torch.zeros(LANES, WIDTH)),
            "is_segment": segment,
            "options": options,
            "source": reader,
            **given,
        }
    )
