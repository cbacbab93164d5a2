"""What leaves are taken to need covers the most resets and cuts that any of their length has."""

from __future__ import annotations

import json
import random

import pytest
import torch

from tbptt_ckpt.budget.irregular import IrregularSteps
from tbptt_ckpt.data.blocks import StepBlock
from tbptt_ckpt.schedule.curves import Curve

WINDOW = 40


def most_by_hand(steps: set[int], cuts: set[int], length: int) -> int:
    """In any leaf of a length: a cut counts where the leaf goes on across it."""
    return max(
        sum(start <= step < start + length for step in steps)
        + sum(start < cut < start + length for cut in cuts)
        for start in range(WINDOW - length + 1)
    )


@pytest.mark.parametrize("seed", range(30))
def test_no_leaf_has_more_than_is_added(seed: int) -> None:
    chosen, base = random.Random(seed), Curve(((1, 100.0), (7, 900.0), (21, 2000.0)))
    irregular, windows = IrregularSteps(), []
    for _ in range(3):
        steps = set(chosen.sample(range(WINDOW), chosen.choice([0, 1, 3, 20])))
        cuts = set(chosen.sample(range(1, WINDOW), chosen.choice([0, 1, 2]))) - steps
        is_denser = irregular.take(steps, cuts, WINDOW)
        windows.append((steps, cuts))
        assert not irregular.take(steps, cuts, WINDOW)
        assert is_denser or not (steps or cuts) or len(windows) > 1
    again = IrregularSteps()
    again.load_state_dict(json.loads(json.dumps(irregular.state_dict())))
    more = Curve(((0, 0.0), (1, 50.0), (5, 90.0)))
    found = again.added(base, more)
    for length in range(1, WINDOW + 1):
        needed = max(most_by_hand(*window, length) for window in windows)
        assert found(length) >= base(length) + (more(needed) if needed else 0.0) - 1e-9
    assert irregular.added(base, None) is base


def test_a_leaf_of_one_step_is_never_cut() -> None:
    irregular, base = IrregularSteps(), Curve.linear(10, 1)
    irregular.take((), [5, 9], WINDOW)
    found = irregular.added(base, Curve(((0, 0.0), (1, 50.0))))
    assert found(2) >= base(2) + 50
    irregular.take([5], (), WINDOW)
    assert irregular.added(base, Curve(((0, 0.0), (1, 50.0))))(1) >= base(1) + 50


def test_which_steps_of_a_block_are_irregular() -> None:
    x = torch.zeros(6, 3, 2)
    weight = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 0, 1], [1, 0, 1], [2, 2, 2], [0, 0, 0]])
    resets = torch.tensor([False, True, False, False, False, False])
    lanes = resets[:, None] & torch.tensor([True, False, False])
    assert StepBlock(4, 10, x, x, None, 0).irregular_steps() == []
    assert StepBlock(4, 10, x, x, None, 0, resets).irregular_steps() == [5]
    assert StepBlock(4, 10, x, x, None, 0, lanes).irregular_steps() == [5]
    assert StepBlock(4, 10, x, x, weight.double(), 0).irregular_steps() == [6, 7, 8, 9]
