"""Which states pass from window to window: what is said beforehand, and what is there."""

from __future__ import annotations

import pytest
import torch
from cases import OVERLAPS
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, TensorSequence
from tbptt_ckpt.budget.window_budget import fullest_window, shape_of
from tbptt_ckpt.engine.sequence_run import SequenceRun
from tbptt_ckpt.schedule.windows import noted_steps, recorded_steps, tbptt_windows

STEPS = 8


class Dropping(nn.Module):
    """Draws at every step, so that each has generators of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.drop = nn.RNNCell(2, 2), nn.Dropout(0.5)

    def forward(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        h = self.cell(self.drop(x), state)
        return h, h


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("k2", [1, 2, 3, 5, 7, None])
@pytest.mark.parametrize("k1", [1, 2, 3])
def test_states_are_recorded_where_it_is_said(k1: int, k2: int | None, overlap: str) -> None:
    module, x, stale = Dropping(), torch.randn(STEPS, 1, 2), overlap == "stale"
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    tbptt = TBPTT(
        module, nn.functional.mse_loss, k1, k2, optimizer, strategy="retain", overlap=overlap
    )
    run = SequenceRun(tbptt.options, tbptt.parts, TensorSequence(x, x), None)
    while (window := run.next_window()) is not None:
        records = run._standing.records
        before = sorted(records.boundaries)
        assert before == recorded_steps(window, STEPS, k1, k2, stale=stale)
        found = {*records.ambients, window.new_start} - {0}
        assert sorted(found) == recorded_steps(window, STEPS, k1, k2, stale=True)
        run.run_window(window)
        left = {*records.boundaries} - {window.stop}
        new = {step for step in left if step not in before or not stale}
        assert new <= {*noted_steps(window, STEPS, k1, k2, stale=stale)}


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("num_steps", [STEPS, None])
@pytest.mark.parametrize("k2", [1, 2, 3, 5, 7, None])
@pytest.mark.parametrize("k1", [1, 2, 3])
def test_the_fullest_window_has_as_much_as_any_later_one(
    k1: int, k2: int | None, num_steps: int | None, stale: bool
) -> None:
    windows = tbptt_windows(STEPS, k1, k2)
    first = windows[0]
    most = fullest_window(first, num_steps, k1, k2)
    reach = k2 if most.stop - most.start == k2 else None
    fullest = shape_of(most, None, k1, reach, stale=stale) if most != first else None
    for window in windows if fullest is not None and (k2 is not None or num_steps) else ():
        shape = shape_of(window, STEPS, k1, k2, stale=stale)
        assert shape.num_steps <= fullest.num_steps
        assert shape.new_steps <= fullest.new_steps
        if window.stop + k1 <= STEPS:  # a short last one begins off the grid, one state more
            assert shape.recorded_states <= fullest.recorded_states
            assert shape.coming_states <= fullest.coming_states
