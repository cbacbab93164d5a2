"""Many windows of what is right, and differs all the same: no replay of them is an error.

`python tests/executor/test_no_false_alarms.py KIND WINDOWS` runs as many as are wanted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from tbptt_ckpt import TBPTT, TensorSequence

LANES, WIDTH, K1, K2 = 2, 6, 8, 16
WINDOWS, NOISY_WINDOWS = 300, 40  # each of the noisy ones is settled


class Cell(nn.Module):
    """A tanh cell of a given gain, with noise in every run of a step."""

    def __init__(self, gain: float, noise: float = 0.0) -> None:
        super().__init__()
        self.linear, self.readout = nn.Linear(2 + WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gain, self.noise = gain, noise
        source = torch.Generator().manual_seed(0)  # where nobody finds it
        self.draw = lambda shape: torch.randn(shape, generator=source)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = self.linear(torch.cat([x, self.gain * h], 1))
        if self.noise:
            h = h * (1 + self.noise * self.draw(h.shape))
        h = torch.tanh(h)
        return self.readout(h), h


class ChaoticLSTM(nn.Module):
    """nn.LSTM with large weights and a readout."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.lstm, self.readout = nn.LSTM(2, WIDTH), nn.Linear(WIDTH, WIDTH)
        with torch.no_grad():
            for weight in self.lstm.parameters():
                weight.mul_(gain)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = self.lstm(x, state)
        return self.readout(y), state


def segments(gain: float, **options: Any) -> Callable[[], tuple[Any, dict[str, Any]]]:
    return lambda: (ChaoticLSTM(gain), {"per_step": False, **options})


KINDS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "chaotic": lambda: (Cell(20.0), {"strategy": "uniform:3"}),
    "chaotic, batched leaves": lambda: (
        Cell(20.0),
        {"strategy": "revolve:3", "time_batching": True},
    ),
    "chaotic, checkpoint": lambda: (
        Cell(20.0),
        {"strategy": "uniform:3", "executor": "checkpoint", "time_batching": True},
    ),
    "bfloat16": lambda: (Cell(5.0), {"strategy": "sqrt", "autocast_dtype": torch.bfloat16}),
    "bfloat16 segments": segments(10.0, strategy="uniform:3", autocast_dtype=torch.bfloat16),
    "segments cut otherwise": segments(15.0, strategy="revolve:2"),
    "long leaves": segments(15.0, strategy="uniform:8"),
    "noise of atomics": lambda: (Cell(20.0, 1e-7), {"strategy": "uniform:3"}),
    "noise of TF32": lambda: (Cell(1.0, 5e-4), {"strategy": "uniform:3"}),
    "noise of TF32, checkpoint": lambda: (
        Cell(1.0, 5e-4),
        {"strategy": "uniform:3", "executor": "checkpoint"},
    ),
}


def run(kind: str, windows: int) -> int:
    """Windows that ran."""
    torch.manual_seed(len(kind))
    module, options = KINDS[kind]()
    optimizer = torch.optim.SGD(module.parameters(), 1e-3)
    data = torch.randn(windows * K1, LANES, 2), torch.randn(windows * K1, LANES, WIDTH)
    first = None if isinstance(module, ChaoticLSTM) else torch.zeros(LANES, WIDTH)
    tbptt = TBPTT(module, mse_loss, K1, K2, optimizer, clip_grad_norm=1.0, **options)
    return sum(1 for _ in tbptt.windows(TensorSequence(*data, time_dim=0), first))


def has_bfloat16_lstm() -> bool:
    """Whether torch has one for this CPU: its kernels ask for instructions that not all have."""
    try:
        with torch.autocast("cpu", torch.bfloat16):
            nn.LSTM(2, WIDTH)(torch.zeros(1, LANES, 2))
    except RuntimeError as error:
        if "could not create a primitive" not in str(error):
            raise
        return False
    return True


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_right_raises_in_no_window(kind: str) -> None:
    if kind == "bfloat16 segments" and not has_bfloat16_lstm():
        pytest.skip("torch has no nn.LSTM in bfloat16 for this CPU")
    windows = NOISY_WINDOWS if "noise" in kind else WINDOWS
    assert run(kind, windows) == windows


if __name__ == "__main__":
    print(sys.argv[1], run(sys.argv[1], int(sys.argv[2])), "windows, no alarm")
