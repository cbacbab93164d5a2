"""Many states are compared at first, and then few, each in its turn."""

from __future__ import annotations

from itertools import islice, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from tbptt_ckpt import TBPTT, TensorSequence
from tbptt_ckpt.errors import ReplayMismatchError
from tbptt_ckpt.executor import compared_states
from tbptt_ckpt.executor.compared_states import (
    FIRST_COMPARED,
    LARGE,
    STEPS_AT_FIRST,
    STEPS_OF_LARGE,
    STEPS_OF_SMALL,
    ComparedStates,
)

STATES = {
    STEPS_OF_SMALL: torch.empty(LARGE - 1, device="meta"),
    STEPS_OF_LARGE: (torch.empty(LARGE // 2, device="meta"),) * 2,
}
MISSED = {1, 3}  # leaves that the sixth window does not compare
LENGTHS = [*range(1, 12), 31, 32, 33, 100, 255, 256, 300]


def _taken(states: ComparedStates, state: Any, spans: list[int]) -> list[int]:
    """Which of a window's states are compared, each that many steps after the one before."""
    states.begin_window()
    return [index for index, steps in enumerate(spans) if states.takes(state, steps)]


def _later() -> ComparedStates:
    """As it is once so many have been compared that fewer are."""
    states = ComparedStates()
    states.begin_window()
    assert all(states.takes(None, STEPS_AT_FIRST) for _ in range(FIRST_COMPARED))
    return states


@pytest.mark.parametrize("length", LENGTHS)
def test_at_first_it_is_each_of_eight_steps_and_one_in_eight_of_shorter_ones(length: int) -> None:
    taken = _taken(ComparedStates(), None, [length] * FIRST_COMPARED)
    assert taken[0] == 0
    assert all((b - a - 1) * length < STEPS_AT_FIRST for a, b in pairwise(taken))


@pytest.mark.parametrize("every", STATES)
@pytest.mark.parametrize("length", LENGTHS)
def test_later_each_has_its_turns(length: int, every: int) -> None:
    states, spans = _later(), [length] * 40
    windows = [_taken(states, STATES[every], spans) for _ in range(every)]
    for taken in windows:
        assert taken[0] == 0  # of each window one at least
        assert len(taken) <= 2 + sum(spans) / every
    for index in range(1, len(spans)):
        assert sum(index in taken for taken in windows) == min(length, every)


def test_spans_of_any_length_have_theirs_too() -> None:
    states, spans = _later(), [50, 3, 20, 7, 1, 40, 2, 300, 5]
    windows = [_taken(states, STATES[STEPS_OF_SMALL], spans) for _ in range(STEPS_OF_SMALL)]
    for index in range(1, len(spans)):
        times = sum(index in taken for taken in windows)
        assert times == min(spans[index], STEPS_OF_SMALL)


def test_after_a_difference_they_are_as_many_as_at_first() -> None:
    states = _later()
    states.compare_all()
    assert _taken(states, STATES[STEPS_OF_SMALL], [STEPS_AT_FIRST] * 100) == list(range(100))


class Spike(nn.Module):
    """Where a graph is made another state after marked inputs, which no later state remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 4)

    def forward(self, x: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        h = self.linear(x)
        return h, h + (torch.is_grad_enabled() and bool(x[0, 0] == 1.0))


@pytest.mark.parametrize("leaf", [1, 2, 3])
@pytest.mark.parametrize("marked", [0, 5])  # the first window, and one in which few are compared
def test_a_difference_is_found_at_once_or_in_its_turn(
    marked: int, leaf: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compared_states, "FIRST_COMPARED", 4)
    monkeypatch.setattr(compared_states, "STEPS_OF_SMALL", 16)
    inputs = torch.zeros(20, 40, 1, 2)
    inputs[marked:, 8 * leaf + 7] = 1.0  # the last step of a leaf
    data = TensorSequence(inputs.flatten(0, 1), torch.zeros(800, 1, 4))
    tbptt = TBPTT(Spike(), mse_loss, 40, 40, strategy="uniform:8", time_batching=False)
    windows = tbptt.windows(data, torch.zeros(1, 4))
    equal = marked + (1 if marked and leaf in MISSED else 0)
    assert len(list(islice(windows, equal))) == equal
    most = 3 if marked else 1
    with pytest.raises(ReplayMismatchError):
        list(islice(windows, most))
