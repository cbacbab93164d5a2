"""Evaluation: the loss of a plain loop, and nothing else changed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import (
    WIDTH,
    WIDTH_IN,
    bitwise,
    lstm,
    lstm_cell,
    masked_loss,
    random_data,
    random_state,
    relative_error,
    tanh_cell,
)
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, ArgumentError, BurnIn, LaneSource, TensorSequence, evaluate

NUM_STEPS = 7
SEGMENTS = (1, 2, 3, 7, 64)


def plain(
    module: nn.Module,
    loss_fn: Callable[..., Any],
    inputs: Tensor,
    targets: Tensor,
    weights: list[float],
    state: Any,
) -> tuple[float, float, Any]:
    """Summed loss over summed weight, the weight, and the final state, step by step."""
    total = count = 0.0
    with torch.no_grad():
        for x, y, weight in zip(inputs, targets, weights, strict=True):
            if isinstance(module, nn.LSTM):
                output, state = module(x[None], state)
                output = output[0]
            else:
                output, state = module(x, state)
            value = loss_fn(output, y)
            loss, size = value if isinstance(value, tuple) else (value, 1.0)
            total += weight * float(loss)
            count += weight * float(size)
    return total / count, count, state


@pytest.mark.parametrize("segment_steps", SEGMENTS)
@pytest.mark.parametrize("make", [tanh_cell, lstm_cell, lstm])
@pytest.mark.parametrize("loss_fn", [F.mse_loss, masked_loss])
@pytest.mark.parametrize("kind", ["tensors", "weights", "absent", "generator"])
def test_loss_is_that_of_a_plain_loop(
    make: Any, loss_fn: Any, kind: str, segment_steps: int
) -> None:
    module, (inputs, targets) = make(), random_data(NUM_STEPS)
    weights = [1.0] * NUM_STEPS
    sequence: Any = TensorSequence(inputs, targets)
    if kind == "weights":
        weights = [0.0, 1.0, 0.5, 2.0, 0.0, 0.0, 3.0]
        sequence = TensorSequence(inputs, targets, weight=torch.tensor(weights))
    elif kind != "tensors":
        weights = [0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0]
        steps = zip(inputs, targets, weights, strict=True)
        sequence = ((x, y if weight else None) for x, y, weight in steps)
        sequence = list(sequence) if kind == "absent" else sequence
    loss, weight, state = plain(module, loss_fn, inputs, targets, weights, None)
    found = evaluate(module, loss_fn, sequence, segment_steps=segment_steps)
    assert found.loss == pytest.approx(loss, rel=1e-12)
    assert found.weight == pytest.approx(weight, rel=1e-12)
    assert found.num_steps == NUM_STEPS
    states = [found.state] if isinstance(found.state, Tensor) else list(found.state)
    expected = [state] if isinstance(state, Tensor) else list(state)
    assert relative_error(states, expected) <= 1e-12


@pytest.mark.parametrize("segment_steps", SEGMENTS)
@pytest.mark.parametrize("make", [tanh_cell, lstm])
def test_lanes_equal_their_sequences_one_by_one(make: Any, segment_steps: int) -> None:
    module, losses = make(), []
    data = [random_data(n, seed=n, lanes=1) for n in (3, 5, 1, 4)]
    for inputs, targets in data:
        loss, _, _ = (
            plain(
                module,
                F.mse_loss,
                inputs,
                targets,
                [float(t >= 1) for t in range(len(inputs))],
                None,
            )
            if len(inputs) > 1
            else (0.0, 0.0, None)
        )
        losses += [loss] * (len(inputs) - 1)
    lanes = LaneSource([TensorSequence(x[:, 0], y[:, 0]) for x, y in data], 2)
    found = evaluate(module, F.mse_loss, BurnIn(lanes, 1), segment_steps=segment_steps)
    assert found.loss == pytest.approx(sum(losses) / len(losses), rel=1e-12)
    assert found.weight == len(losses)


class Restless(nn.Module):
    """Dropout, batch normalisation, a buffer that counts, parts in different modes."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(WIDTH_IN, WIDTH)
        self.norm, self.drop = nn.BatchNorm1d(WIDTH), nn.Dropout(0.5)
        self.frozen = nn.Dropout(0.5).eval()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        self.calls += 1
        h = self.cell(x, h)
        noise = torch.rand(()) * 0  # drawn in eval mode too
        return self.frozen(self.drop(self.norm(h))) + noise, h


def everything(module: nn.Module) -> list[Any]:
    """What an evaluation must leave alone."""
    return [
        [b.clone() for b in module.buffers()],
        [p.detach().clone() for p in module.parameters()],
        [p.grad.clone() for p in module.parameters() if p.grad is not None],
        torch.tensor([part.training for part in module.modules()]),
        torch.get_rng_state(),
    ]


class Flaky(Exception):
    """Raised by a loss."""


@pytest.mark.parametrize("fails", [False, True])
def test_an_evaluation_leaves_no_trace(fails: bool) -> None:
    torch.manual_seed(3)
    module = Restless().double()
    inputs, targets = random_data(NUM_STEPS, lanes=4)
    data = TensorSequence(inputs, targets)
    tbptt = TBPTT(module, F.mse_loss, 2, 4)
    tbptt.train(data, random_state(lanes=4))  # some gradients, buffers with values
    before = everything(module)

    def loss(y: Tensor, target: Tensor) -> Tensor:
        assert not module.training
        assert not y.requires_grad
        if fails and torch.equal(target, targets[4]):
            raise Flaky
        return F.mse_loss(y, target)

    if fails:
        with pytest.raises(Flaky):
            evaluate(module, loss, data, random_state(lanes=4), segment_steps=3)
    else:
        found = [evaluate(module, loss, data, random_state(lanes=4)) for _ in range(2)]
        assert found[0].loss == found[1].loss
        assert found[0].loss == tbptt.evaluate(data, random_state(lanes=4)).loss
    assert bitwise(everything(module), before)


@pytest.mark.parametrize("overlap", ["refresh", "stale"])
@pytest.mark.parametrize("with_optimizer", [False, True])
def test_a_run_does_not_notice_evaluations_between_its_windows(
    overlap: str, with_optimizer: bool
) -> None:
    inputs, targets = random_data(NUM_STEPS, lanes=4)
    resets = torch.zeros(NUM_STEPS, 4, dtype=torch.bool)
    resets[3, 2] = True
    data = TensorSequence(inputs, targets, resets=resets)
    runs = []
    for evaluates in (False, True):
        torch.manual_seed(4)
        module = Restless().double()
        init = random_state(lanes=4).requires_grad_()
        parameters = [*module.parameters(), init]
        optimizer = torch.optim.Adam(parameters, lr=0.1) if with_optimizer else None
        tbptt = TBPTT(module, F.mse_loss, 2, 4, optimizer, overlap=overlap, strategy="uniform:2")
        seen = []
        for window in tbptt.windows(data, init):
            if evaluates:
                tbptt.evaluate(data, init, segment_steps=3)
            seen.append([window.state, window.loss, *[p.grad.clone() for p in parameters]])
        runs.append([seen, everything(module)])
    assert bitwise(*runs)


def test_a_loss_with_modes_is_evaluated_too() -> None:
    class Loss(nn.Module):
        def forward(self, y: Tensor, target: Tensor) -> Tensor:
            return F.mse_loss(y, target) * (100.0 if self.training else 1.0)

    loss = Loss()
    inputs, targets = random_data(3)
    found = evaluate(tanh_cell(), loss, TensorSequence(inputs, targets))
    assert found.loss == evaluate(tanh_cell(), F.mse_loss, TensorSequence(inputs, targets)).loss
    assert loss.training


def test_no_target_is_no_loss() -> None:
    inputs, _ = random_data(3)
    found = evaluate(tanh_cell(), F.mse_loss, TensorSequence(inputs))
    assert found.loss is None
    assert found.weight == 0.0


def test_evaluations_nest_in_no_grad_and_inference_mode() -> None:
    inputs, targets = random_data(5)
    data = TensorSequence(inputs, targets)
    expected = evaluate(tanh_cell(), F.mse_loss, data).loss
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert evaluate(tanh_cell(), F.mse_loss, data).loss == expected


def test_a_hook_in_the_module_does_not_matter() -> None:
    cell = tanh_cell()

    def step(x: Tensor, h: Any) -> Any:
        y, h = cell(x, h)
        h.register_hook(lambda grad: grad)
        return y, h

    data = TensorSequence(*random_data(5))
    assert evaluate(step, F.mse_loss, data).loss == evaluate(cell, F.mse_loss, data).loss


@pytest.mark.parametrize("segment_steps", [0, -1, 1.5, True])
def test_segment_steps_that_cannot_work_are_named(segment_steps: Any) -> None:
    data = TensorSequence(*random_data(3))
    with pytest.raises(ArgumentError, match="segment_steps="):
        evaluate(tanh_cell(), F.mse_loss, data, segment_steps=segment_steps)


def test_every_position_of_the_end_of_a_stream_is_found() -> None:
    for num_steps, segment_steps in itertools.product(range(1, 7), range(1, 5)):
        steps = list(zip(*random_data(num_steps), strict=True))
        found = evaluate(tanh_cell(), F.mse_loss, iter(steps), segment_steps=segment_steps)
        assert found.num_steps == found.weight == num_steps
    with pytest.raises(ArgumentError, match="empty"):
        evaluate(tanh_cell(), F.mse_loss, iter([]))
