"""A run goes on with another number of ranks, and has the losses of one process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import WIDTH, random_data, tanh_cell
from runs_of_ranks import BY_DEFAULT, CASES, LANES, SHARDED, check_goes_on, losses_of, trainer
from several_ranks import on_two_ranks
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, ArgumentError, SnapshotError, TensorSequence, Trainer
from tbptt_ckpt.module.trees import iterate_leaves
from tbptt_ckpt.trainer.resplitting import resplit

State = dict[str, Any]


@pytest.mark.exhaustive
def test_all_that_has_lanes_goes_on_with_other_ranks(tmp_path: Path) -> None:
    on_two_ranks(partial(check_goes_on, tmp_path, tuple(CASES)))


def split(states: list[State], rank: int, count: int, trainer: Trainer) -> State:
    lane_dim = trainer.tbptt.parts.recurrence.lane_dim
    is_shared = trainer._state._passes.begins_shared()
    return resplit(states, rank, count, lane_dim, is_shared=is_shared)


def begun(name: str) -> Trainer:
    here = trainer(name, None, alone=True)
    losses_of(here, 4, saves=False)
    return here


def cases() -> Iterator[Any]:
    for name in (name for name in CASES if name not in SHARDED):
        is_short = name in (*BY_DEFAULT, "tensors", "a stream")
        yield pytest.param(name, marks=() if is_short else pytest.mark.exhaustive)


@pytest.mark.parametrize("name", list(cases()))
def test_what_is_cut_and_joined_is_what_it_was(name: str) -> None:
    here = begun(name)
    state = here.state_dict()
    for count in (2, 3, LANES):
        parts = [split([state], rank, count, here) for rank in range(count)]
        joined = split(parts, 0, 1, here)
        for owner in ("learning", "run", "init_state"):
            found, expected = (list(iterate_leaves(each[owner])) for each in (joined, state))
            assert len(found) == len(expected)
            for one, other in zip(found, expected, strict=True):
                if isinstance(other, Tensor):
                    assert torch.allclose(one, other, rtol=1e-15, atol=0), (owner, count)
                else:
                    assert repr(one) == repr(other), (owner, count)
        assert joined["identity"]["data"] == state["identity"]["data"] | {"lanes": LANES}
        if name == "tensors":
            sizes = [part["run"]["records"]["boundaries"][0]["state"].shape[0] for part in parts]
            assert sizes == [LANES // count + (rank < LANES % count) for rank in range(count)]


class Carries(nn.Module):
    """A cell whose state holds something beside the lanes."""

    def __init__(self, beside: Any) -> None:
        super().__init__()
        self.cell, self.beside = tanh_cell(), beside

    def forward(self, x: Tensor, state: Any) -> Any:
        h, beside = state or (torch.zeros(len(x), WIDTH, dtype=x.dtype), self.beside)
        y, h = self.cell(x, h)
        return y, (h, beside)


def carrying(beside: Any) -> Trainer:
    module = Carries(beside)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    tbptt = TBPTT(module, nn.functional.mse_loss, 2, 4, optimizer, strategy="step")
    found = Trainer(tbptt, TensorSequence(*random_data(6, lanes=LANES)))
    next(found.windows())
    return found


def with_another_source(state: State) -> State:
    found = copy.deepcopy(state)
    found["run"]["reader"]["source"]["seed"] = 7
    return found


def with_another_step(state: State) -> State:
    found = copy.deepcopy(state)
    kept = found["run"]["records"]["kept"]
    kept[99] = kept.pop(max(kept))
    return found


@pytest.mark.parametrize(
    ("make", "change", "count", "error", "words"),
    [
        (lambda: carrying(torch.ones(1)), None, 2, ArgumentError, r"\(1,\) without the \[5\] la"),
        (lambda: carrying(torch.ones(())), None, 2, ArgumentError, r"\(\) without the \[5\] la"),
        (lambda: carrying(np.ones(5)), None, 2, ArgumentError, "cannot be split; go on with 1"),
        (lambda: carrying(3), None, 6, ArgumentError, "lanes=5 are too few for 6 ranks"),
        (lambda: begun("lanes of sequences"), with_another_source, 1, ArgumentError, "own_lanes"),
        (lambda: begun("tensors"), with_another_step, 1, SnapshotError, "different steps"),
    ],
)
def test_what_cannot_be_split_is_refused(
    make: Callable[[], Trainer],
    change: Callable[[State], State] | None,
    count: int,
    error: type[Exception],
    words: str,
) -> None:
    here = make()
    state = here.state_dict()
    states = [state] if change is None else [state, change(state)]
    with pytest.raises(error, match=words):
        split(states, 0, count, here)


def test_a_number_that_all_carry_is_no_lane() -> None:
    here = carrying(3)
    parts = [split([here.state_dict()], rank, 2, here) for rank in range(2)]
    carried = split(parts, 0, 1, here)["run"]["records"]["boundaries"][0]["state"]
    assert carried[0].shape == (LANES, WIDTH)
    assert carried[1] == 3


@pytest.mark.parametrize(
    ("ranks", "error", "words"),
    [
        ({"rank": 1, "count": 2, "others": []}, ArgumentError, "of rank 1 of 2 alone"),
        (
            {"rank": 0, "count": 2, "others": [{"own": [[["learning"], 1]], "gone": []}]},
            SnapshotError,
            "no state of this run",
        ),
        (
            {"rank": 0, "count": 2, "others": [{"own": [], "gone": [["nothing"]]}]},
            SnapshotError,
            "nothing",
        ),
        ({"rank": 0, "count": 2}, SnapshotError, "ranks"),
    ],
)
def test_states_of_ranks_that_no_run_has_are_refused(
    ranks: State, error: type[Exception], words: str
) -> None:
    here = begun("tensors")
    state, steps = here.state_dict() | {"ranks": ranks}, here.num_steps
    with pytest.raises(error, match=words):
        here.load_state_dict(state)
    assert here.num_steps == steps
