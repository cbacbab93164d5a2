"""Lanes that are continued beside lanes that are drawn anew, in one batch."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import OVERLAPS, bitwise, gradients, random_state, relative_error, tanh_cell
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, ArgumentError, LaneSource, TensorSequence, Trainer

LENGTHS = (7, 3, 11, 5)
WIDTHS = (2, 3)  # of inputs and targets


def sequences() -> list[TensorSequence]:
    """Each step's first input says which sequence it is of, its second which step."""
    made = []
    for number, length in enumerate(LENGTHS):
        torch.manual_seed(number)
        steps = torch.stack([torch.full((length,), float(number)), torch.arange(length) * 1.0], 1)
        made.append(TensorSequence(steps.double(), torch.randn(length, 3).double()))
    return made


def mixed(seed: int = 4, steps: int = 4) -> LaneSource:
    return LaneSource(sequences(), 5, seed=seed, fresh_lanes=3, fresh_steps=steps)


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_some_lanes_go_on_and_others_begin_stretches_anywhere(epoch: int) -> None:
    source, lasting = mixed(), LaneSource(sequences(), 2, seed=4)
    source.set_epoch(epoch)
    lasting.set_epoch(epoch)
    stop = len(source)
    assert stop == len(lasting)
    inputs, targets = source.read(0, stop)
    resets, weights = source.resets(0, stop), source.weights(0, stop)
    for mine, its in zip(source.read(0, stop), lasting.read(0, stop), strict=True):
        assert torch.equal(mine[:, :2], its)
    assert torch.equal(resets[:, :2], lasting.resets(0, stop))
    assert torch.equal(weights[:, :2], lasting.weights(0, stop))
    assert resets[:, 2:].all(1).tolist() == [step % 4 == 0 for step in range(stop)]
    assert resets[:, 2:].any(1).tolist() == resets[:, 2:].all(1).tolist()
    assert (weights[:, 2:] == 1).all()
    given = sequences()
    for lane in (2, 3, 4):
        for begin in range(0, stop, 4):
            number, first = map(int, inputs[begin, lane].tolist())
            steps = min(4, stop - begin)
            assert first + 4 <= LENGTHS[number]
            read = given[number].read(first, first + steps)
            assert torch.equal(inputs[begin : begin + steps, lane], read[0])
            assert torch.equal(targets[begin : begin + steps, lane], read[1])


def test_every_stretch_is_as_likely_as_any_other() -> None:
    """By seeds, epochs, lanes and numbers; sequences that are too short are never drawn."""
    seen: Counter[tuple[float, ...]] = Counter()
    for seed in range(20):
        source = mixed(seed)
        for epoch in range(30):
            source.set_epoch(epoch)
            inputs, _ = source.read(0, len(source))
            seen.update(tuple(row.tolist()) for row in inputs[::4, 2:].reshape(-1, 2))
    places = {(n, at) for n, length in enumerate(LENGTHS) for at in range(length - 3)}
    assert set(seen) == places
    expected = sum(seen.values()) / len(places)
    chi_square = sum((count - expected) ** 2 / expected for count in seen.values())
    assert chi_square < 2.5 * len(places)  # 14 places: 5 in 100,000 are above


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize(("k1", "k2"), [(4, 4), (3, 7), (5, 3)])
def test_gradients_are_those_of_lanes_one_by_one(k1: int, k2: int, overlap: str) -> None:
    """Frozen weights, so that both overlaps are what one long graph gives, cut at windows."""
    source, module, first = mixed(), tanh_cell(), random_state(lanes=5)
    inputs, targets = source.read(0, len(source))
    resets, weights = source.resets(0, len(source)), source.weights(0, len(source))
    how: Any = {"strategy": "sqrt", "overlap": overlap}
    tbptt = TBPTT(module, F.mse_loss, k1, k2, **how)
    for window in tbptt.windows(source, first):
        found = gradients([*module.parameters()])
        module.zero_grad()
        total, valid = torch.zeros(()).double(), 0.0
        for lane in range(5):
            state: Tensor = first[lane : lane + 1]
            for t in range(window.stop):
                if resets[t, lane]:
                    state = first[lane : lane + 1]
                if t == window.start:
                    state = state.detach()
                y, state = module(inputs[t, lane][None], state)
                y = y if t >= window.start else y.detach()
                if t >= window.new_start:
                    total = total + weights[t, lane] * F.mse_loss(y, targets[t, lane][None])
                    valid += float(weights[t, lane])
        (total / valid).backward()
        assert relative_error(found, gradients([*module.parameters()])) <= 1e-12
        module.zero_grad()


def test_a_resumed_run_is_bitwise_one_that_never_stopped() -> None:
    def trainer() -> tuple[nn.Module, Trainer]:
        module = tanh_cell()
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        return module, Trainer(TBPTT(module, F.mse_loss, 3, 5, optimizer), mixed(), epochs=3)

    expected, whole = trainer()
    states = [copy.deepcopy(whole.state_dict()) for _ in whole.windows()]
    assert len(states) > 9
    for state in states[:-1]:
        module, resumed = trainer()
        resumed.load_state_dict(state)
        resumed.train()
        assert bitwise([*module.parameters()], [*expected.parameters()])


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"fresh_lanes": 2, "fresh_steps": 4}, "fresh_lanes=2 must be fewer than lanes=2"),
        ({"fresh_lanes": 1}, "fresh_lanes=1 and fresh_steps=None go together"),
        ({"fresh_steps": 4}, "fresh_lanes=0 and fresh_steps=4 go together"),
        ({"fresh_lanes": 1, "fresh_steps": 4, "seed": None}, "give a seed"),
        ({"fresh_lanes": 1, "fresh_steps": 12}, "fresh_steps=12 is more than the longest"),
    ],
)
def test_what_cannot_work_is_one_error(how: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        LaneSource(sequences(), 2, **{"seed": 0, **how})


def test_another_share_of_fresh_lanes_is_another_source() -> None:
    saved = mixed().state_dict()
    for other in (mixed(steps=2), LaneSource(sequences(), 5, seed=4)):
        with pytest.raises(ArgumentError, match="the saved source was"):
            other.load_state_dict(saved)
    assert "fresh" not in LaneSource(sequences(), 5, seed=4).state_dict()  # as it ever was
    assert "3 of them fresh every 4 steps" in repr(mixed())
