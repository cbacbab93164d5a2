"""Regression on a file that stays on disk: a pendulum's position from what pushes it.

The file is mapped, cut into 32 lanes and read a window at a time, as float32 of its float64.
Training keeps within a byte budget that is smaller than the file; the last tenth is what it is
tried on.

    $ python docs/examples/mapped_regression.py
    explains 79.6 % of the variance; peak within a budget of 800 KiB, file 1563 KiB

Elsewhere within 8 %.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, ArraySequence, LaneSource
from tbptt_ckpt.data import map_file


class Filter(nn.Module):
    """Foretells the position of a pendulum from what pushes it."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.readout = nn.GRU(1, 24), nn.Linear(24, 1)

    def forward(self, push: Tensor, state):  # [T, B, 1] -> [T, B, 1]
        y, state = self.gru(push, state)
        return self.readout(y), state


def record(path: Path, steps: int) -> None:
    """Writes float64 rows (push, position) of a damped pendulum, piece by piece."""
    random = np.random.default_rng(0)
    rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float64, shape=(steps, 2))
    position = speed = push = 0.0
    for t in range(steps):
        push = 0.9 * push + 0.4 * random.normal()
        speed += 0.1 * (push - 4 * np.sin(position) - 0.4 * speed)
        position += 0.1 * speed
        rows[t] = push, position
    rows.flush()


def main(steps: int = 100_000) -> str:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pendulum.npy")
        record(path, steps)
        rows = map_file(path)  # [T, 2], stays on disk
        cut = steps * 9 // 10
        data, other = (
            LaneSource(ArraySequence(part[:, :1], part[:, 1:], dtype=torch.float32), lanes=32)
            for part in (rows[:cut], rows[cut:])
        )
        model = Filter()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        tbptt = TBPTT(
            model,
            nn.MSELoss(),
            k1=50,
            k2=100,
            optimizer=optimizer,
            per_step=False,
            memory_budget="800KiB",
            measure_memory=True,
        )
        kept = "within" if tbptt.train(data).peak_bytes <= 800 * 2**10 else "above"
        unexplained = tbptt.evaluate(other).loss / rows[cut:, 1].var()
        size = path.stat().st_size / 2**10
    return (
        f"explains {100 * (1 - unexplained):.1f} % of the variance; "
        f"peak {kept} a budget of 800 KiB, file {size:.0f} KiB"
    )


if __name__ == "__main__":
    print(main())
