"""Modules whose steps are compiled, and their windows held against naive loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import naive
import torch
import torch.nn.functional as F
from cases import (
    LANES,
    WIDTH,
    WIDTH_IN,
    TanhCell,
    check_window,
    engine_sequence,
    gradients,
    masked_loss,
    naive_problem,
    random_data,
)
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, Recurrent

WEIGHTS = (1.0, 0.0, 2.0, 0.5, 0.0, 1.0, 3.0, 1.0, 1.0)
LEAF, ADVANCE = "compiled block of a leaf", "compiled block of an advance"
LOSSES: dict[str, Callable[[Tensor, Tensor], Any]] = {"mean": F.mse_loss, "pair": masked_loss}


class Normed(nn.Module):
    """An LSTM with a layer norm and a readout, which no kernel runs."""

    def __init__(self, more: nn.Module | None = None) -> None:
        super().__init__()
        self.inputs, self.state = nn.Linear(WIDTH_IN, 4 * WIDTH), nn.Linear(WIDTH, 4 * WIDTH)
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.more, self.factor = more or nn.Identity(), 1.0

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        h, c = state
        i, f, g, o = (self.inputs(x) + self.state(h)).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(self.norm(c)) * self.factor
        return self.out(self.more(h)), (h, c)


def normed(more: nn.Module | None = None) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    zeros = torch.zeros(LANES, WIDTH, dtype=torch.float64)
    return Normed(more).double(), (zeros, zeros)  # one tensor twice


def from_none() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return TanhCell().double(), None


def in_parts() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    cell = nn.GRUCell(WIDTH, WIDTH)
    mixed = Recurrent(lambda x, h: 2 * (cell(x, h),), nn.Linear(WIDTH_IN, WIDTH))
    mixed.cell = cell
    return mixed.double(), torch.zeros(LANES, WIDTH, dtype=torch.float64)


KINDS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "normed": normed,
    "from None": from_none,
    "in parts": in_parts,
}


def names(tbptt: TBPTT) -> set[str]:
    return {each.operation for each in tbptt.batched_operations if not each.reason}


def check(kind: str, loss: str, weights: Any, overlap: str, **how: Any) -> TBPTT:
    (module, init), (inputs, targets) = KINDS[kind](), random_data(9)
    problem = naive_problem(module, inputs, targets, init, loss_fn=LOSSES[loss], weights=weights)
    problem.step = module
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    expected = list(naive.OVERLAPS[overlap](problem, how["k1"], how["k2"], optimizer=optimizer))
    module, init = KINDS[kind]()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    tbptt = TBPTT(module, LOSSES[loss], optimizer=optimizer, overlap=overlap, **how)
    sequence = engine_sequence(inputs, targets, weights=weights)
    where = (kind, loss, overlap, how)
    for result, window in zip(tbptt.windows(sequence, init), expected, strict=True):
        grads = gradients(list(module.parameters()))
        check_window(where, result, grads, window, bitwise_state=False, tolerance=1e-10)
    return tbptt
