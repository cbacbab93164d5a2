"""Many windows of what is right, and differs all the same: no replay of them is an error.

`python -m benchmarks.false_alarms` runs as many as are wanted.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.false_alarms import found_faults, run
from benchmarks.right_replays import SITUATIONS, Cell
from tbptt_ckpt.errors import ReplayMismatchError

WINDOWS, SETTLED_WINDOWS = 300, 60
DIFFER = [name for name in SITUATIONS if "noise" in name or "forms" in name or "cut" in name]


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", SITUATIONS)
def test_what_is_right_raises_in_no_window(name: str) -> None:
    windows = SETTLED_WINDOWS if name in DIFFER else WINDOWS
    counts = run(SITUATIONS[name], windows)
    assert (counts.windows, counts.alarms) == (windows, 0)
    assert counts.compared >= windows - 5  # a window has something to compare, save the first
    assert counts.settled > (5 if name in DIFFER else -1)


@pytest.mark.parametrize("name", ["chaotic", *DIFFER])
def test_a_count_is_found_where_right_replays_differ_too(name: str) -> None:
    assert found_faults(SITUATIONS[name], 2) == 2


def test_trainings_have_noise_of_their_own() -> None:
    drawn = []
    for seed in range(2):
        torch.manual_seed(seed)
        drawn.append(Cell(1.0, 1.0).draw((2, 6)))
    assert not torch.equal(*drawn)


def test_noise_in_one_run_of_hundreds_is_an_error() -> None:
    """That nothing is kept outside is seen by running again, and there is no end to that."""
    situation = SITUATIONS["noise of atomics"]
    rare = replace(situation, make=lambda: Cell(20.0, 1e-5, often=2e-3))
    with pytest.raises(ReplayMismatchError):
        for _ in rare.windows(0, 1000):
            pass
