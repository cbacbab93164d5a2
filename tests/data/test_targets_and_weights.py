"""Absent targets, weights of lanes and steps, losses that are (sum, weight) pairs."""

from __future__ import annotations

from typing import Any

import naive
import pytest
import torch
import torch.nn.functional as F
from cases import (
    EXECUTORS,
    LANES,
    OVERLAPS,
    WIDTH,
    bitwise,
    check_window,
    clear_gradients,
    gradients,
    lstm,
    mean_loss,
    naive_problem,
    random_data,
    relative_error,
    tanh_cell,
)
from grids import covering
from models_for_tests import CountedCalls, moving
from runs_of_data import (
    NUM_STEPS,
    RECURRENT,
    WeightedOpenSource,
    WeightedSource,
    batch_first_lstm,
    make_module,
    run,
    with_targets_at,
)
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, TensorSequence


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("kind", RECURRENT)
@pytest.mark.parametrize("k2", [5, None])
def test_many_to_one_runs_each_step_once_until_the_label(
    k2: int | None, kind: str, overlap: str
) -> None:
    data, k1 = random_data(12), 2
    module = CountedCalls(make_module(kind), time_dim=None if kind == "cell" else 0)
    before = [p.detach().clone() for p in module.parameters()]
    tbptt = TBPTT(
        module,
        mean_loss,
        k1,
        k2,
        moving(module),
        overlap=overlap,
        strategy="retain",
        per_step=kind == "cell",
        check_replays=False,  # which runs the overlap twice, once
    )
    for window in tbptt.windows(with_targets_at({11}, *data)):
        if window.stop < 12:
            assert module.num_steps == window.stop
            assert window.recomputed_steps == 0
            assert window.loss is None
            assert window.plan is None
            assert window.drift == 0.0
            assert not window.updated
            assert bitwise(list(module.parameters()), before)
    reach = 12 if k2 is None else k2
    assert (window.start, window.new_start, window.stop) == (12 - reach, 10, 12)
    assert module.num_steps == 10 + reach
    assert window.updated

    reference = make_module(kind)
    state, (inputs, targets) = None, data
    for t in range(12):
        state = naive.mapped(Tensor.detach, state) if t == window.start else state
        x = inputs[t] if kind == "cell" else inputs[t : t + 1]
        y, state = reference(x, state)
    mean_loss(y if kind == "cell" else y[0], targets[11]).backward()
    actual, expected = gradients(list(module.parameters())), gradients(list(reference.parameters()))
    assert relative_error(actual, expected) <= 1e-12


@pytest.mark.parametrize("as_function", [False, True])
def test_forward_only_windows_run_whole_after_an_update(as_function: bool) -> None:
    """Under refresh the state handed on is today's; under stale it is carried."""
    data, present = random_data(18), {0, 1, 2, 9, 10, 11}

    def executed(overlap: str) -> list[int]:
        module = CountedCalls(tanh_cell())
        called: Any = (lambda x, state: module(x, state)) if as_function else module
        options: dict[str, Any] = {"strategy": "retain", "check_replays": False}
        tbptt = TBPTT(called, mean_loss, 3, 6, moving(module), overlap=overlap, **options)
        counts, before = [], 0
        for window in tbptt.windows(with_targets_at(present, *data)):
            assert window.updated == (window.stop in (3, 12))
            counts.append(module.num_steps - before)
            assert window.recomputed_steps == counts[-1] - 3
            before = module.num_steps
        return counts

    # Windows end at 3*, 6, 9, 12*, 15, 18; those with a star have targets and update.
    assert executed("refresh") == [3, 6, 3, 6, 6, 3]
    assert executed("stale") == [3, 3, 3, 6, 3, 3]


@covering(
    present=[{2}, {0, 5, 6, 14}, {4, 12, 13}, set(range(1, 15, 2))],
    executor=EXECUTORS,
    overlap=OVERLAPS,
    source=["list", "generator", "weight"],
    kind=RECURRENT,
)
def test_scattered_targets_equal_a_naive_loop(
    present: set[int], executor: str, overlap: str, source: str, kind: str
) -> None:
    num_steps = 15
    inputs, targets = random_data(num_steps)
    reference, module = make_module(kind), make_module(kind)
    absent = sorted(set(range(num_steps)) - present)
    problem = naive_problem(reference, inputs, targets, None, absent=absent)
    loop = naive.OVERLAPS[overlap](problem, 3, 7, optimizer=moving(reference))
    sequence: Any = with_targets_at(present, inputs, targets)
    if source == "generator":
        sequence = iter(sequence)
    elif source == "weight":
        weight = torch.tensor([float(t in present) for t in range(num_steps)])
        sequence = TensorSequence(inputs, targets, weight=weight)
    tbptt = TBPTT(
        module,
        mean_loss,
        3,
        7,
        moving(module),
        overlap=overlap,
        executor=executor,
        strategy="uniform:2",
    )
    for result, window in zip(tbptt.windows(sequence), loop, strict=True):
        grads = gradients(list(module.parameters()))
        check_window(sorted(present), result, grads, window, bitwise_state=False)
        assert result.updated == (window.loss is not None)


def test_without_any_target_a_run_only_runs_forward() -> None:
    inputs, _ = random_data(NUM_STEPS)
    module = CountedCalls(tanh_cell())
    result = TBPTT(module, mean_loss, 3, 7, moving(module)).train(TensorSequence(inputs))
    state = None
    with torch.no_grad():
        for x in inputs:
            _, state = tanh_cell()(x, state)
    assert result.loss is None
    assert bitwise(result.state, state)
    assert module.num_steps == NUM_STEPS
    assert all(p.grad is None for p in module.parameters())


# Weights


def lane_losses(y: Tensor, target: Tensor) -> Tensor:
    """[..., B] mean squared errors, lane by lane."""
    return (y - target).square().mean(-1)


def weighted_bptt(
    module: nn.Module, inputs: Tensor, targets: Tensor, weight: Tensor, reduction: str
) -> tuple[Tensor, list[Tensor | None]]:
    """By hand: sum of w * loss over all steps and lanes, over the sum of w; plain BPTT."""
    clear_gradients(list(module.parameters()))
    state, total = None, torch.zeros((), dtype=torch.float64)
    for t, x in enumerate(inputs):
        y, state = module(x, state)
        total = total + (weight[t] * lane_losses(y, targets[t])).sum()
    loss = total / weight.sum() if reduction == "mean" else total
    loss.backward()
    return loss.detach(), gradients(list(module.parameters()))


LANE_WEIGHTS = torch.tensor(
    [[1.0, 1.0], [0.0, 2.0], [0.5, 0.0], [0.0, 0.0], [3.0, 0.5], [1.0, 0.0], [2.0, 2.0]],
    dtype=torch.float64,
)


def pair_loss(y: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Summed over lanes, with the number of lanes as weight."""
    losses = lane_losses(y, target)
    return losses.sum(), torch.tensor(float(losses.numel()))


@pytest.mark.parametrize("loss_fn", [mean_loss, pair_loss])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("source", ["tensors", "source", "open_source"])
@pytest.mark.parametrize("make", [tanh_cell, lstm, batch_first_lstm])
@pytest.mark.parametrize("strategy", ["retain", "uniform:2"])
def test_lane_weights_equal_a_hand_computation(
    strategy: str, make: Any, source: str, reduction: str, loss_fn: Any
) -> None:
    inputs, targets = random_data(len(LANE_WEIGHTS))
    reference = tanh_cell() if make is tanh_cell else _StepLSTM()
    loss, grads = weighted_bptt(reference, inputs, targets, LANE_WEIGHTS, reduction)
    sequence: Any = TensorSequence(inputs, targets, time_dim=0, weight=LANE_WEIGHTS)
    if source == "source":
        sequence = WeightedSource(inputs, targets, LANE_WEIGHTS)
    elif source == "open_source":
        sequence = WeightedOpenSource(inputs, targets, LANE_WEIGHTS)
    module = make()
    tbptt = TBPTT(module, loss_fn, len(inputs), None, reduction=reduction, strategy=strategy)
    (window,) = tbptt.windows(sequence)
    assert relative_error([window.loss], [loss]) <= 1e-12
    assert relative_error(gradients(list(module.parameters())), grads) <= 1e-12


class _StepLSTM(nn.Module):
    """`nn.LSTM` one step at a time; its parameters in the same order."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = lstm()

    def forward(self, x: Tensor, state: Any) -> Any:
        y, state = self.lstm(x[None], state)
        return y[0], state


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", RECURRENT)
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_step_weights_scale_losses_and_count_in_the_divisor(
    overlap: str, kind: str, reduction: str
) -> None:
    (inputs, targets), weights = random_data(9), [1.0, 0.5, 0.0, 2.0, 2.0, 0.0, 0.25, 1.0, 3.0]
    reference, module = make_module(kind), make_module(kind)
    problem = naive_problem(reference, inputs, targets, None, weights=weights)
    loop = naive.OVERLAPS[overlap](problem, 2, 5, reduction=reduction)
    clear_gradients(list(module.parameters()))
    tbptt = TBPTT(
        module,
        mean_loss,
        2,
        5,
        torch.optim.SGD(module.parameters(), lr=0.0),
        overlap=overlap,
        reduction=reduction,
        strategy="uniform:2",
    )
    sequence = TensorSequence(inputs, targets, weight=torch.tensor(weights))
    for result, window in zip(tbptt.windows(sequence), loop, strict=True):
        grads = gradients(list(module.parameters()))
        check_window("weights", result, grads, window, bitwise_state=kind == "cell")


def test_equal_weights_are_no_weights() -> None:
    inputs, targets = random_data(NUM_STEPS)
    expected = run(tanh_cell(), TensorSequence(inputs, targets))
    for weight in (torch.ones(NUM_STEPS), torch.ones(NUM_STEPS, LANES), torch.ones(NUM_STEPS) / 4):
        actual = run(tanh_cell(), TensorSequence(inputs, targets, weight=weight))
        for one, other in zip(actual, expected, strict=True):
            assert relative_error(one.grads, other.grads) <= 1e-12
            assert relative_error([one.loss], [other.loss]) <= 1e-12


def test_lanes_without_weight_are_not_shown_to_the_loss() -> None:
    (inputs, targets), shapes = random_data(len(LANE_WEIGHTS)), []
    targets[LANE_WEIGHTS == 0] = float("nan")

    def loss_fn(y: Tensor, target: Tensor) -> Tensor:
        shapes.append(y.shape)
        return mean_loss(y, target)

    sequence = TensorSequence(inputs, targets, weight=LANE_WEIGHTS)
    for seen in run(tanh_cell(), sequence, 2, 4, loss_fn=loss_fn):
        assert seen.loss is None or torch.isfinite(seen.loss)
        assert all(torch.isfinite(weight).all() for weight in seen.weights)
    assert set(shapes) == {(1, WIDTH), (2, WIDTH)}


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("lanes", [False, True])
def test_windows_without_any_weight_make_no_update(lanes: bool, overlap: str) -> None:
    inputs, targets = random_data(9)
    weight = torch.ones(9, LANES) if lanes else torch.ones(9)
    weight[3:6] = 0.0
    seen = run(tanh_cell(), TensorSequence(inputs, targets, weight=weight), 3, 5, overlap=overlap)
    assert [window.loss is None for window in seen] == [False, True, False]
    assert [window.updated for window in seen] == [True, False, True]
    assert bitwise(seen[0].weights, seen[1].weights)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_last_loss_takes_the_weights_of_its_step(reduction: str) -> None:
    inputs, targets = random_data(len(LANE_WEIGHTS))
    only_last = torch.zeros_like(LANE_WEIGHTS)
    only_last[-2] = LANE_WEIGHTS[-2]
    loss, grads = weighted_bptt(tanh_cell(), inputs[:-1], targets[:-1], only_last[:-1], reduction)
    module = tanh_cell()
    sequence = TensorSequence(inputs[:-1], targets[:-1], weight=LANE_WEIGHTS[:-1])
    tbptt = TBPTT(module, mean_loss, 6, None, loss="last", reduction=reduction)
    (window,) = tbptt.windows(sequence)
    assert relative_error([window.loss], [loss]) <= 1e-12
    assert relative_error(gradients(list(module.parameters())), grads) <= 1e-12


# (loss_sum, weight) pairs


IGNORED = -100


def summed_cross_entropy(y: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    loss_sum = F.cross_entropy(
        y.reshape(-1, WIDTH), target.reshape(-1), ignore_index=IGNORED, reduction="sum"
    )
    return loss_sum, (target != IGNORED).sum()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("strategy", ["retain", "step", "uniform:2"])
@pytest.mark.parametrize("kind", RECURRENT)
def test_ignored_positions(
    kind: str, strategy: str, overlap: str, executor: str, reduction: str
) -> None:
    """Windows end at 3, 6, 9*, 12, 13: the one with a star has ignored positions only."""
    inputs, _ = random_data(NUM_STEPS)
    generator = torch.Generator().manual_seed(7)
    targets = torch.randint(WIDTH, (NUM_STEPS, LANES), generator=generator)
    targets[1] = targets[4, 0] = targets[10, 1] = IGNORED
    targets[6:9] = IGNORED
    reference, module = make_module(kind), make_module(kind)
    problem = naive_problem(reference, inputs, targets, None, loss_fn=summed_cross_entropy)
    loop = naive.OVERLAPS[overlap](problem, 3, 7, reduction=reduction, optimizer=moving(reference))
    tbptt = TBPTT(
        module,
        summed_cross_entropy,
        3,
        7,
        moving(module),
        overlap=overlap,
        reduction=reduction,
        strategy=strategy,
        executor=executor,
    )
    for result, window in zip(tbptt.windows(TensorSequence(inputs, targets)), loop, strict=True):
        assert (result.loss is None) == (result.stop == 9)
        assert result.updated == (result.stop != 9)
        if result.stop == 9:
            assert window.loss is None
            assert relative_error(naive.tensors(result.state), naive.tensors(window.state)) <= 1e-12
            continue
        grads = gradients(list(module.parameters()))
        check_window("ignored", result, grads, window, bitwise_state=False)


def test_a_run_of_ignored_positions_has_no_loss() -> None:
    inputs, _ = random_data(6)
    targets = torch.full((6, LANES), IGNORED)
    module = tanh_cell()
    tbptt = TBPTT(module, summed_cross_entropy, 2, 4, moving(module))
    result = tbptt.train(TensorSequence(inputs, targets))
    assert result.loss is None
    assert bitwise(list(module.parameters()), list(tanh_cell().parameters()))


@pytest.mark.parametrize("weight", [2, 2.0, torch.tensor(2), torch.tensor(2.0)])
def test_the_weight_of_a_pair_may_be_any_number(weight: Any) -> None:
    def loss_fn(y: Tensor, target: Tensor) -> Any:
        return 2.0 * mean_loss(y, target), weight

    inputs, targets = random_data(NUM_STEPS)
    expected = run(tanh_cell(), TensorSequence(inputs, targets))
    actual = run(tanh_cell(), TensorSequence(inputs, targets), loss_fn=loss_fn)
    for one, other in zip(actual, expected, strict=True):
        assert relative_error(one.grads, other.grads) <= 1e-12
        assert relative_error([one.loss], [other.loss]) <= 1e-12
