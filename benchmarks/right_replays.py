"""Trainings whose replays are right, and differ from the runs they repeat all the same.

Those that must differ for some leaves to be suspected at all differ by construction: two right
forms of a step, sums whose order hangs on the length of a call, noise in every run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from tbptt_ckpt import TBPTT, TensorSequence

INPUTS, OUTPUTS = 8, 6
ATOMICS, TF32 = 1e-7, 5e-4  # relative noise


class Cell(nn.Module):
    """A sine cell, chaotic where its gain is large, with noise in each run of a step.

    `two_forms` sums its products in another order where no graph is recorded; of `noisy` numbers of
    a state there is noise in the first ones, or in all, in so many of all runs as `often` says.
    """

    def __init__(
        self,
        gain: float,
        noise: float = 0.0,
        *,
        width: int = 6,
        outputs: int = OUTPUTS,
        noisy: int | None = None,
        often: float = 1.0,
        two_forms: bool = False,
    ) -> None:
        super().__init__()
        self.linear, self.readout = nn.Linear(INPUTS + width, width), nn.Linear(width, outputs)
        self.gain, self.noise, self.two_forms = gain, noise, two_forms
        # Where nobody finds it, and another one in each training.
        source = torch.Generator().manual_seed(torch.initial_seed())
        counts = torch.arange(width) < (width if noisy is None else noisy)

        def draw(shape: torch.Size) -> Tensor:
            is_there = torch.rand((), generator=source) < often
            return torch.randn(shape, generator=source) * counts * is_there

        self.draw = draw

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        joined = torch.cat([x, self.gain * h], 1)
        if self.two_forms and not torch.is_grad_enabled():
            order = torch.arange(joined.shape[1] - 1, -1, -1)
            weight, bias = self.linear.weight[:, order], self.linear.bias
            h = (joined[:, order].unsqueeze(1) * weight).sum(-1) + bias
        else:
            h = self.linear(joined)
        if self.noise:
            h = h * (1 + self.noise * self.draw(h.shape))
        h = torch.sin(h)
        return self.readout(h), h


class Segments(nn.Module):
    """A recurrent layer with large weights and a readout."""

    def __init__(self, layer: type[nn.LSTM] | type[nn.GRU], gain: float, width: int) -> None:
        super().__init__()
        self.layer, self.readout = layer(INPUTS, width), nn.Linear(width, OUTPUTS)
        with torch.no_grad():
            for weight in self.layer.parameters():
                weight.mul_(gain)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = self.layer(x, state)
        return self.readout(y), state


class SizedKernels(nn.Module):
    """Sine steps whose products are summed in an order that hangs on the length of a call."""

    def __init__(self, gain: float, width: int) -> None:
        super().__init__()
        self.inner, self.readout = nn.Linear(INPUTS, width), nn.Linear(width, OUTPUTS)
        self.recurrent = nn.Linear(width, width, bias=False)
        self.gain = gain

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        kind = torch.float64 if len(x) % 2 else torch.float32  # rounded at the end, or throughout
        driven = nn.functional.linear(
            x.to(kind), self.inner.weight.to(kind), self.inner.bias.to(kind)
        )
        states = []
        for step in driven.to(x.dtype):
            h = torch.sin(step + self.recurrent(self.gain * h))
            states.append(h)
        return self.readout(torch.stack(states)), h


@dataclass(frozen=True)
class Situation:
    """A module that is right, and how its windows run."""

    make: Callable[[], nn.Module]
    lanes: int = 2
    width: int = 6
    outputs: int = OUTPUTS
    k1: int = 8
    k2: int = 16
    options: dict[str, Any] = field(default_factory=dict)

    def windows(self, seed: int, num_windows: int, *, faulty: bool = False) -> Iterator[Any]:
        """Train one, which keeps a count outside of its state where it is `faulty`."""
        torch.manual_seed(seed)
        module = self.make()
        per_step = self.options.get("per_step", True)
        first = torch.zeros(self.lanes, self.width) if per_step else self._state_of(module)
        shape = num_windows * self.k1, self.lanes
        data = torch.randn(*shape, INPUTS), torch.randn(*shape, self.outputs)
        optimizer = torch.optim.SGD(module.parameters(), 1e-3)
        module = Counting(module) if faulty else module
        tbptt = TBPTT(
            module, mse_loss, self.k1, self.k2, optimizer, clip_grad_norm=1.0, **self.options
        )
        yield from tbptt.windows(TensorSequence(*data, time_dim=0), first)

    def _state_of(self, module: nn.Module) -> Tensor | None:
        sized = isinstance(module, SizedKernels)
        return torch.zeros(self.lanes, self.width) if sized else None


class Counting(nn.Module):
    """Changes what a module reaches by a count that no replay finds as it was."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = self.module(x, state)
        self.calls += 1
        factor = 1 + 0.02 * (self.calls % 50)
        parts = state if isinstance(state, tuple) else (state,)
        changed = tuple(part * factor for part in parts)
        return y, changed if isinstance(state, tuple) else changed[0]


def noisy(make: Callable[[], nn.Module], **changes: Any) -> Situation:
    """Short windows, each of which is settled."""
    options = {"strategy": "uniform:4", **changes.pop("options", {})}
    return Situation(make, k1=4, k2=8, options=options, **changes)


CUT = {"strategy": "uniform:8"}
BATCHED = {**CUT, "time_batching": True}
IN_ONE_GRAPH = {"executor": "checkpoint"}
HALF = {"autocast_dtype": torch.bfloat16}
SEGMENTS = {"per_step": False}

SITUATIONS: dict[str, Situation] = {
    "chaotic": Situation(lambda: Cell(20.0), options=CUT),
    "chaotic, checkpoint": Situation(lambda: Cell(20.0), options=CUT | IN_ONE_GRAPH),
    "chaotic, batched leaves": Situation(lambda: Cell(20.0), options=BATCHED),
    "chaotic, batched leaves, checkpoint": Situation(
        lambda: Cell(20.0), options=BATCHED | IN_ONE_GRAPH
    ),
    "chaotic, two forms": Situation(lambda: Cell(20.0, two_forms=True), options=CUT),
    "bfloat16": Situation(lambda: Cell(5.0), options=CUT | HALF),
    "bfloat16, two forms": Situation(lambda: Cell(5.0, two_forms=True), options=CUT | HALF),
    "bfloat16 segments": Situation(
        lambda: Segments(nn.GRU, 10.0, 6), options=CUT | HALF | SEGMENTS
    ),
    "segments cut otherwise": Situation(
        lambda: SizedKernels(20.0, 6), options={"strategy": "revolve:2"} | SEGMENTS
    ),
    "nn.LSTM, long leaves": Situation(
        lambda: Segments(nn.LSTM, 30.0, 40), lanes=3, width=40, options=CUT | SEGMENTS
    ),
    "noise of atomics": noisy(lambda: Cell(20.0, ATOMICS)),
    "noise of atomics in one number of many": noisy(
        lambda: Cell(20.0, ATOMICS, width=40, noisy=1), lanes=1, width=40
    ),
    "noise in one run of ten": noisy(lambda: Cell(20.0, 10 * ATOMICS, often=0.1)),
    "noise of TF32": noisy(lambda: Cell(1.0, TF32)),
    "noise of TF32, checkpoint": noisy(lambda: Cell(1.0, TF32), options=IN_ONE_GRAPH),
    "noise of TF32, outputs near zero": noisy(
        lambda: Cell(1.0, TF32, outputs=1), lanes=1, outputs=1
    ),
}
