"""What leaves are taken to need covers the most resets and cuts that any of their length has."""

from __future__ import annotations

import json
import random
from itertools import pairwise

import pytest
import torch
from grids import later
from torch import nn

import tbptt_ckpt.budget.calibrate as calibrate
from tbptt_ckpt import TBPTT, InfeasibleBudgetError, LaneSource, TensorSequence, measure_costs
from tbptt_ckpt.budget.checked_costs import ROUNDING_BYTES
from tbptt_ckpt.budget.irregular import IrregularSteps
from tbptt_ckpt.budget.probe import SegmentProbe
from tbptt_ckpt.budget.samples import SegmentBytes
from tbptt_ckpt.data.blocks import StepBlock
from tbptt_ckpt.schedule.curves import Curve

WINDOW = 40


def taken_by_hand(
    steps: set[int], cuts: set[int], length: int, more: Curve, spared: Curve
) -> float:
    """In any leaf of a length: what cuts counts where the leaf goes on across it."""
    taken = []
    for start in range(WINDOW - length + 1):
        stop = start + length
        count = sum(start < cut < stop for cut in steps | cuts)
        edges = [start, *sorted(s for s in cuts | steps if start < s < stop), stop]
        piece = max(after - before for before, after in pairwise(edges))
        taken.append(more(count) - spared(length) + spared(piece))
    return max(taken)


@pytest.mark.parametrize("seed", range(30))
def test_no_leaf_takes_more_than_is_said(seed: int) -> None:
    chosen, base = random.Random(seed), Curve(((1, 100.0), (7, 900.0), (21, 2000.0)))
    spared, more = (
        Curve(((1, 50.0), (9, 130.0), (30, 700.0))),
        Curve(((0, 20.0), (1, 50.0), (5, 90))),
    )
    irregular, windows = IrregularSteps(), []
    for _ in range(3):
        steps = set(chosen.sample(range(WINDOW), chosen.choice([0, 1, 3, 20])))
        cuts = set(chosen.sample(range(1, WINDOW), chosen.choice([0, 1, 2]))) - steps
        window = steps, cuts, (0, WINDOW)
        is_denser = irregular.take(*window, weighs=False)
        windows.append((steps, cuts))
        assert not irregular.take(*window, weighs=False)
        assert is_denser or not (steps or cuts) or len(windows) > 1
    again = IrregularSteps()
    again.load_state_dict(json.loads(json.dumps(irregular.state_dict())))
    found = again.added(base, more, spared)
    for length in range(1, WINDOW + 1):
        needed = max(taken_by_hand(*window, length, more, spared) for window in windows)
        assert found(length) >= base(length) + needed - 1e-9
    assert irregular.added(base, None, spared) is base


def test_segments_that_are_often_cut_spare_what_long_ones_take() -> None:
    base, more, spared = Curve.linear(0, 30), Curve.linear(0, 1), Curve.linear(0, 20)
    irregular, resets = IrregularSteps(), range(0, WINDOW, 4)
    irregular.take(resets, (), (0, WINDOW), weighs=False)
    found = irregular.added(base, more, spared)
    assert base(WINDOW) - 20 * 36 <= found(WINDOW) <= base(WINDOW) + 11 - 0.9 * 20 * 36
    irregular.take((), (), (0, WINDOW), weighs=False)  # one without a reset takes all of it
    assert irregular.added(base, more, spared)(WINDOW) >= base(WINDOW)


def test_a_leaf_of_one_step_takes_the_same_in_every_window() -> None:
    irregular, base, spared = IrregularSteps(), Curve.linear(10, 1), Curve.linear(0, 0)
    more = Curve(((0, 3.0), (1, 50.0)))
    assert irregular.added(base, more, spared, 2.0)(1) == base(1) + 3  # lanes left out included
    irregular.take([5], [9], (0, WINDOW), weighs=True)
    found = irregular.added(base, more, spared, 2.0)
    assert found(1) == base(1) + 3
    assert found(2) >= base(2) + 50 + 2 * 2


def test_lanes_that_are_left_out_cut_nothing() -> None:
    irregular, base, spared = IrregularSteps(), Curve.linear(10, 1), Curve.linear(0, 0)
    assert irregular.take((), (), (0, WINDOW), weighs=True)
    assert irregular.added(base, Curve.linear(0, 50), spared, 0.0)(9) == base(9)
    assert irregular.added(base, Curve.linear(0, 50), spared, 2.0)(9) == base(9) + 18
    assert irregular.added(base, None, spared, 2.0)(9) == base(9) + 18


def test_what_a_block_does_to_its_lanes() -> None:
    x = torch.zeros(6, 3, 2)
    resets = torch.tensor([False, True, False, False, False, False])
    lanes = resets[:, None] & torch.tensor([True, False, False])
    assert StepBlock(4, 10, x, x, None, 0).reset_steps() == []
    assert StepBlock(4, 10, x, x, None, 0, resets).reset_steps() == [5]
    assert StepBlock(4, 10, x, x, None, 0, lanes).reset_steps() == [5]
    ones = torch.ones(6, 3, dtype=torch.float64)
    left_out, changed, padded = ones.clone(), ones.clone(), ones.clone()
    left_out[:, 1], changed[3:], padded[:] = 0, 2, 0
    weights = (None, ones, left_out, changed, padded)
    found = [StepBlock(4, 10, x, x, weight, 0).weighs() for weight in weights]
    assert found == [False, False, True, True, False]


def test_lanes_that_end_and_begin_leave_little_of_a_budget_unused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Most steps have lanes that are left out, and few a reset; long leaves pay on any machine."""
    monkeypatch.setattr(calibrate, "seconds_curve", lambda samples: Curve.linear(1.0, 1e-3))
    torch.manual_seed(0)
    module, lengths = nn.LSTM(64, 64), [90 - 6 * lane for lane in range(8)]
    cut = [TensorSequence(torch.randn(n, 64), torch.randn(n, 64)) for n in lengths + lengths[:4]]
    tbptt = TBPTT(
        module,
        nn.functional.mse_loss,
        *(20, 60),
        torch.optim.Adam(module.parameters()),
        memory_budget=1_900_000,
        measure_memory=True,
    )
    windows = list(tbptt.windows(LaneSource(cut, lanes=8)))
    assert max(window.peak_bytes for window in windows) <= 1_900_000
    for window in windows[3:]:
        assert window.plan.predicted_peak_bytes <= 1.13 * window.peak_bytes, window


def test_the_smallest_budget_stays_enough_where_lanes_begin_late() -> None:
    """A leaf of one step takes more where lanes begin, which no first window has."""

    def run(budget: int) -> list[int]:
        torch.manual_seed(0)
        module, lengths = nn.LSTM(48, 48), (60, 53, 47, 41, 30, 20, 9, 5, 2)
        data = [TensorSequence(torch.randn(n, 48), torch.randn(n, 48)) for n in lengths]
        optimizer, loss = torch.optim.Adam(module.parameters()), nn.functional.mse_loss
        tbptt = TBPTT(module, loss, 10, 30, optimizer, memory_budget=budget, measure_memory=True)
        return [w.peak_bytes or 0 for w in tbptt.windows(LaneSource(data, lanes=8))]

    with pytest.raises(InfeasibleBudgetError) as refused:
        run(1)
    budget = refused.value.smallest_budget_bytes or 0
    assert max(run(budget)) <= budget


@pytest.mark.parametrize("layer", [nn.LSTM, later(nn.GRU), later(nn.RNN)])
@pytest.mark.parametrize("factor", [2.5, later(2.0), later(3.5), later(5.0)])
def test_what_cut_leaves_take_is_measured_within_the_room_that_there_is(
    layer: type[nn.RNNBase], factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call for each step takes a workspace each: several of them as much as a long call."""
    peaks, bytes_of = [], SegmentProbe.bytes_of

    def noted(self: SegmentProbe, steps: int) -> SegmentBytes:
        found = bytes_of(self, steps)
        peaks.append((steps, found.peak))
        return found

    monkeypatch.setattr(SegmentProbe, "bytes_of", noted)
    module, loss, data = layer(8, 16), nn.functional.mse_loss, torch.randn(16, 4, 24)
    inputs, targets = data[..., :8], data[..., 8:]
    measure_costs(module, loss, inputs, targets, memory=1)
    room = int(factor * max(peak for steps, peak in peaks if steps == 1))
    peaks.clear()
    measure_costs(module, loss, inputs, targets, memory=room)
    assert {1} < {steps for steps, _ in peaks}
    assert max(peak for steps, peak in peaks if steps > 1) <= room + ROUNDING_BYTES


@pytest.mark.parametrize(
    "budget",
    [306_624, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (294_624, 370_624))],
)
def test_update_points_cut_the_last_leaf_too(budget: int) -> None:
    """Each piece has its part of a gradient; what short pieces spare is none of a graph's."""
    torch.manual_seed(0)
    module = nn.LSTM(24, 24)
    optimizer = torch.optim.SGD(module.parameters(), 0.01)
    loss, data = (
        nn.functional.mse_loss,
        TensorSequence(torch.randn(60, 4, 24), torch.randn(60, 4, 24)),
    )
    tbptt = TBPTT(module, loss, 8, 24, optimizer, memory_budget=budget, measure_memory=True)
    for window in tbptt.windows(data):
        assert (window.peak_bytes or 0) <= budget
