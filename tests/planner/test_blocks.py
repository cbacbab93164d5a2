"""Plans whose leaves are whole blocks of steps, where these fit."""

import itertools
from dataclasses import replace

import pytest
from planned_costs import check_prediction, line_costs

from tbptt_ckpt import InfeasibleBudgetError, plan
from tbptt_ckpt.schedule import Curve
from tbptt_ckpt.schedule.actions import Differentiate


@pytest.mark.parametrize("block", [2, 3, 5])
def test_leaves_are_whole_blocks_but_for_one_that_begins_the_window(block: int) -> None:
    costs = replace(line_costs(3, 2, 5, 0.5), block_steps=block)
    for steps, budget in itertools.product(range(1, 30, 2), range(7, 70, 7)):
        try:
            alone = plan(steps, replace(costs, block_steps=1), budget_bytes=budget)
        except InfeasibleBudgetError:
            with pytest.raises(InfeasibleBudgetError):
                plan(steps, costs, budget_bytes=budget)
            continue
        found = plan(steps, costs, budget_bytes=budget)
        check_prediction(found, costs, budget, {})
        leaves = [a for a in found.schedule if isinstance(a, Differentiate)]
        rests = [leaf for leaf in leaves if (leaf.stop - leaf.start) % block]
        if budget >= 3 + 5 + 2 * block:  # a state, and a leaf of one block
            assert all(leaf.start == 0 for leaf in rests), (steps, budget)
        assert found.predicted_seconds >= alone.predicted_seconds - 1e-9


def test_blocks_are_taken_wherever_they_fit() -> None:
    costs = replace(line_costs(1, 2, 0), block_steps=4)
    for steps in range(4, 40, 5):
        for budget in range(10 + -(-steps // 4), 60):  # a state at each block, and one leaf
            assert plan(steps, costs, budget_bytes=budget).longest_leaf >= 4, (steps, budget)


@pytest.mark.parametrize(("joints", "new_steps"), [((5, 9), None), ((), 7), ((4,), 9)])
def test_blocks_between_given_states_and_with_few_losses(
    joints: tuple[int, ...], new_steps: int | None
) -> None:
    costs = replace(line_costs(2, 3, 1), block_steps=2)
    window = {"joints": joints} | ({} if new_steps is None else {"new_steps": new_steps})
    for steps, budget in itertools.product((12, 19), range(30, 90, 3)):
        found = plan(steps, costs, budget_bytes=budget, **window)
        check_prediction(found, costs, budget, window)


def test_a_curve_of_blocks_says_what_the_one_of_steps_says() -> None:
    curve = Curve(((1, 2.0), (3, 5.0), (8, 6.0), (21, 40.0)))
    for block in range(1, 9):
        for count in range(1, 30):
            assert curve.of_blocks(block)(count) == pytest.approx(curve(block * count))
