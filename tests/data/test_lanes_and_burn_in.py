"""What lanes make of sequences: no step lost or doubled; and steps that only warm the state."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from numbered_data import numbers, several

from tbptt_ckpt import BurnIn, LaneSource, TensorSequence
from tbptt_ckpt.data.layout import shuffled

# Lanes


def valid_rows(source: Any) -> Counter[tuple[float, ...]]:
    """How often each step was read in a lane that counts."""
    inputs, _ = source.read(0, len(source))
    weights = source.weights(0, len(source))
    return Counter(
        tuple(inputs[t, b].flatten().tolist())
        for t in range(len(source))
        for b in range(inputs.shape[1])
        if weights[t, b]
    )


@pytest.mark.parametrize("lanes", [1, 2, 3, 4, 7, 9])
@pytest.mark.parametrize("seed", [None, 0, 1, -3, 2**63])
def test_no_step_is_lost_or_doubled_in_any_epoch(lanes: int, seed: int | None) -> None:
    expected = Counter(tuple(row) for s in several() for row in s.read(0, len(s))[0].tolist())
    source = LaneSource(several(), lanes, seed=seed)
    for epoch in range(4):
        source.set_epoch(epoch)
        assert valid_rows(source) == expected


@pytest.mark.parametrize("num_steps", range(1, 14))
def test_one_sequence_is_cut_into_contiguous_lanes(num_steps: int) -> None:
    for lanes in range(1, num_steps + 1):
        source = LaneSource(TensorSequence(torch.arange(num_steps)), lanes)
        inputs, targets = source.read(0, len(source))
        assert targets is None
        weights = source.weights(0, len(source))
        stretches = [inputs[:, b][weights[:, b] > 0].tolist() for b in range(lanes)]
        assert [t for stretch in stretches for t in stretch] == list(range(num_steps))
        assert max(map(len, stretches)) - min(map(len, stretches)) <= 1
        assert not source.resets(1, len(source)).any() if len(source) > 1 else True


def test_a_lane_that_ends_takes_the_next_sequence() -> None:
    source = LaneSource(several((3, 1, 4, 2)), 2)
    resets = source.resets(0, len(source))
    # lane 0: sequence 0 at 0, sequence 3 at 3; lane 1: sequence 1 at 0, sequence 2 at 1
    assert resets.nonzero().tolist() == [[0, 0], [0, 1], [1, 1], [3, 0]]
    assert source.weights(0, 5).tolist() == [[1, 1]] * 5
    assert len(LaneSource(several((3, 1, 4, 3)), 2)) == 6
    assert LaneSource(several((3, 1, 4, 3)), 2).weights(4, 6).tolist() == [[1, 1], [1, 0]]


def test_padding_is_zeros_without_weight() -> None:
    source = LaneSource(several((3, 1)), 3)
    inputs, targets = source.read(0, 3)
    padding = source.weights(0, 3) == 0
    assert padding.tolist() == [[False, False, True], [False, True, True], [False, True, True]]
    assert not inputs[padding].any()
    assert not targets[padding].any()


def test_order_is_a_function_of_seed_and_epoch() -> None:
    orders = {
        (seed, epoch): tuple(shuffled(6, seed, epoch).tolist())
        for seed in range(30)
        for epoch in range(30)
    }
    assert all(sorted(order) == list(range(6)) for order in orders.values())
    assert len(set(orders.values())) > 480  # of 720 permutations, 900 draws hit some 514
    # It must never change: a run that is resumed with another version would read other steps.
    assert shuffled(8, 0, 0).tolist() == [4, 0, 1, 7, 6, 2, 5, 3]
    torch.manual_seed(0)
    one = LaneSource(several(), 2, seed=3)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    other = LaneSource(several(), 2, seed=3)
    assert torch.equal(one.read(0, len(one))[0], other.read(0, len(other))[0])


def test_every_permutation_is_about_as_likely() -> None:
    counts = Counter(tuple(shuffled(3, seed, 0).tolist()) for seed in range(6000))
    assert len(counts) == 6
    assert max(abs(count - 1000) for count in counts.values()) < 150  # five sigmas


def test_epochs_differ_only_with_a_seed() -> None:
    for seed, differ in ((None, False), (2, True)):
        source = LaneSource(several(), 2, seed=seed)
        before = source.read(0, len(source))[0]
        source.set_epoch(1)
        after = source.read(0, len(source))[0]
        assert (before.shape != after.shape or not torch.equal(before, after)) == differ


def test_lane_sources_nest_any_data() -> None:
    sequences = [
        TensorSequence(
            {"x": torch.randn(2, n, 3), "id": torch.arange(2 * n).reshape(2, n)}, None, time_dim=1
        )
        for n in (2, 3)
    ]
    inputs, targets = LaneSource(sequences, 2).read(0, 3)
    assert targets is None
    assert inputs["x"].shape == (3, 2, 2, 3)
    assert inputs["id"].dtype == torch.int64
    for lane, sequence in enumerate(sequences):
        steps = len(sequence)
        assert torch.equal(inputs["x"][:steps, lane], sequence.inputs["x"].movedim(1, 0))


# Burn-in


@pytest.mark.parametrize("num_burn_in_steps", [1, 2, 3, 9])
def test_burn_in_takes_the_weight_of_the_first_steps(num_burn_in_steps: int) -> None:
    lanes = LaneSource(several(), 2)
    source = BurnIn(lanes, num_burn_in_steps)
    weights, resets = lanes.weights(0, len(lanes)), lanes.resets(0, len(lanes))
    expected = weights.clone()
    for lane in range(2):
        age = 0
        for t in range(len(lanes)):
            age = 0 if resets[t, lane] else age + 1
            if age < num_burn_in_steps:
                expected[t, lane] = 0.0
    assert torch.equal(source.weights(0, len(source)), expected)


def test_burn_in_without_resets_takes_the_first_steps_alone() -> None:
    source = BurnIn(TensorSequence(numbers(5), numbers(5)), 2)
    assert source.weights(0, 5).tolist() == [0, 0, 1, 1, 1]
    assert source.weights(3, 5).tolist() == [1, 1]
    weight = torch.arange(10.0).reshape(5, 2)
    source = BurnIn(TensorSequence(numbers(5), numbers(5), weight=weight), 2)
    assert source.weights(1, 4).tolist() == [[0, 0], [4, 5], [6, 7]]
