"""Where the states of a window lie, and in how many bits."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor

from tbptt_ckpt.executor import ReplayExecutor

from .carriers import LANES, WIDTH, Cell, carried
from .case import Case, Dice


def in_a_folder(dice: Dice) -> Case:
    """States in a file: the same bits, with and without a budget."""
    options: dict[str, Any] = {"executor": ReplayExecutor(offload=tempfile.gettempdir())}
    if dice.maybe(0.1):
        options |= {"strategy": dice.choice(("auto", "optimal")), "memory_budget": "64MiB"}
    return carried(dice, options=options)


class Coarse(Cell):
    """A state that float32 holds exactly, by a rounding that gradients do not see."""

    def __init__(self) -> None:
        super().__init__("gru")

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, h = super().forward(x, state)
        return y, h + (h.float().double() - h).detach()


def exact(dice: Dice) -> Case:
    """Kept in float32 what has no more bits: nothing changes, under every strategy."""
    kept = ReplayExecutor(state_dtype=torch.float32)
    if dice.maybe(0.3):
        kept = ReplayExecutor(tempfile.gettempdir(), torch.float32)
    return carried(dice, Coarse, segment=False, options={"executor": kept})


def rounded(dice: Dice) -> Case:
    """A state of each step kept in fewer bits: leaves of one step begin there, but the last."""
    dtype = dice.choice((torch.float32, torch.bfloat16))
    kept = ReplayExecutor(state_dtype=dtype)
    options = {"executor": kept, "strategy": "step", "overlap": "refresh"}
    case = carried(dice, options=options)
    case.rounded = dtype
    return case


class Counted(Cell):
    """Carries whole numbers too, which no narrower dtype is for."""

    def __init__(self) -> None:
        super().__init__("gru")

    def start(self) -> Any:
        return torch.zeros(LANES, WIDTH), torch.zeros(LANES, dtype=torch.int64)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        h, number = state
        y, h = super().forward(x * torch.cos(number)[:, None], h)
        return y, (h, number + 2**20)


def counted(dice: Dice) -> Case:
    """Whole numbers in the state, in a file or beside rounded tensors."""
    if dice.maybe(0.5):
        executor = ReplayExecutor(offload=tempfile.gettempdir())
        return carried(dice, Counted, segment=False, options={"executor": executor})
    executor = ReplayExecutor(state_dtype=torch.float32)
    options = {"executor": executor, "strategy": "step", "overlap": "refresh"}
    return carried(dice, Counted, segment=False, options=options, rounded=torch.float32)


KINDS = {
    "storage.in_a_folder": in_a_folder,
    "storage.exact": exact,
    "storage.rounded": rounded,
    "storage.counted": counted,
}
