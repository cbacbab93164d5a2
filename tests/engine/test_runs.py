"""Runs and their results: laziness, drift, dtypes, the caller's own `no_grad`."""

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
    WIDTH_IN,
    bitwise,
    check_window,
    clear_gradients,
    gradients,
    lstm,
    lstm_cell,
    mean_loss,
    naive_problem,
    random_data,
    relative_error,
    tanh_cell,
)
from models_for_tests import CountedCalls, check_same_windows, moving, observe
from small_runs import K1, K2, NUM_STEPS, data
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, TensorSequence, TrainResult, tbptt_windows

# Accumulation and laziness


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_without_an_optimizer_two_runs_sum(overlap: str, executor: str) -> None:
    module = tanh_cell()
    before = [p.detach().clone() for p in module.parameters()]
    tbptt = TBPTT(module, mean_loss, K1, K2, overlap=overlap, executor=executor)
    tbptt.train(data())
    once = gradients(list(module.parameters()))
    result = tbptt.train(data())
    twice = gradients(list(module.parameters()))
    assert relative_error(twice, [2 * grad for grad in once]) <= 1e-12
    assert bitwise(before, list(module.parameters()))
    assert result.num_windows == 5
    assert not any(window.updated for window in tbptt.windows(data()))


def test_with_an_optimizer_gradients_from_before_do_not_count() -> None:
    def run(left_over: float | None) -> list[Any]:
        module = tanh_cell()
        for p in module.parameters() if left_over is not None else ():
            p.grad = torch.full_like(p, left_over)
        tbptt = TBPTT(module, mean_loss, K1, K2, moving(module))
        return observe(tbptt, data(), parameters=module.parameters())

    check_same_windows(run(100.0), run(None))


def test_windows_are_lazy() -> None:
    module = CountedCalls(tanh_cell())
    # The check of replays would run the overlap twice more, once.
    options = {"strategy": "retain", "check_replays": False}
    tbptt = TBPTT(module, mean_loss, K1, K2, moving(module), **options)
    windows = tbptt.windows(data())
    assert module.num_steps == 0
    for stop, executed in ((3, 3), (6, 9), (9, 16)):
        assert next(windows).stop == stop
        assert module.num_steps == executed


def test_weights_may_change_between_windows() -> None:
    """The next window starts with the weights it finds."""
    module, reference = tanh_cell(), tanh_cell()
    inputs, targets = random_data(NUM_STEPS)
    problem = naive_problem(reference, inputs, targets, None)
    tbptt = TBPTT(module, mean_loss, K1, K2, strategy="uniform:2")
    for result, expected in zip(tbptt.windows(data()), naive.refresh(problem, K1, K2), strict=True):
        check_window(
            "by hand", result, gradients(list(module.parameters())), expected, bitwise_state=False
        )
        for owner in (module, reference):
            with torch.no_grad():
                owner.readout.weight.mul_(0.5)
                owner.recurrence.bias.add_(0.1)
        clear_gradients(list(module.parameters()))


def test_leaving_a_run_in_the_middle_leaves_a_working_tbptt() -> None:
    module, other = tanh_cell(), tanh_cell()
    tbptt = TBPTT(module, mean_loss, K1, K2, torch.optim.SGD(module.parameters(), lr=0.0))
    observe(tbptt, data(), parameters=module.parameters(), most=2)
    whole = TBPTT(other, mean_loss, K1, K2, torch.optim.SGD(other.parameters(), lr=0.0))
    check_same_windows(
        observe(tbptt, data(), parameters=module.parameters()),
        observe(whole, data(), parameters=other.parameters()),
    )


# Drift, dtypes, grad modes


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_drift_is_zero_exactly_while_weights_stand_still(overlap: str) -> None:
    def drifts(lr: float) -> list[float]:
        module = tanh_cell()
        tbptt = TBPTT(module, mean_loss, K1, K2, moving(module, lr=lr), overlap=overlap)
        return [window.drift for window in tbptt.windows(data())]

    assert drifts(0.0) == [0.0] * 5
    moved = drifts(0.2)
    assert moved[0] == 0.0  # nothing ran again
    assert all(1e-5 < drift < 1.0 for drift in moved[1:])
    assert max(drifts(0.02)) < min(moved[1:])


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_drift_is_zero_where_windows_do_not_overlap(overlap: str) -> None:
    module = tanh_cell()
    tbptt = TBPTT(module, mean_loss, K1, K1, moving(module), overlap=overlap)
    assert all(window.drift == 0.0 for window in tbptt.windows(data(4 * K1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [tanh_cell, lstm])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_dtypes_are_the_users(executor: str, make: Any, dtype: torch.dtype) -> None:
    module, (inputs, targets) = make().to(dtype), random_data(NUM_STEPS)
    sequence = TensorSequence(inputs.to(dtype), targets.to(dtype))
    tbptt = TBPTT(module, mean_loss, K1, K2, moving(module), executor=executor)
    for window in tbptt.windows(sequence):
        assert window.loss.dtype == dtype
        assert {state.dtype for state in naive.tensors(window.state)} == {dtype}
        assert {p.grad.dtype for p in module.parameters()} == {dtype}


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_the_callers_no_grad_makes_no_difference(executor: str, overlap: str) -> None:
    def run() -> list[Any]:
        module = tanh_cell()
        tbptt = TBPTT(
            module,
            mean_loss,
            K1,
            K2,
            moving(module),
            overlap=overlap,
            executor=executor,
            strategy="uniform:2",
        )
        return observe(tbptt, data(), parameters=module.parameters())

    with torch.no_grad():
        inside = run()
        assert not torch.is_grad_enabled()
    check_same_windows(inside, run())
    assert torch.is_grad_enabled()


# Results


def test_fields_of_a_window() -> None:
    module = CountedCalls(lstm_cell())
    # Which runs some steps once more, and calls no module for the steps of a segment.
    options = {"strategy": "uniform:2", "check_replays": False, "time_batching": False}
    tbptt = TBPTT(module, mean_loss, K1, K2, moving(module), **options)
    executed_before = 0
    for index, (result, window) in enumerate(
        zip(tbptt.windows(data()), tbptt_windows(NUM_STEPS, K1, K2), strict=True)
    ):
        executed, executed_before = module.num_steps - executed_before, module.num_steps
        assert result.index == index == window.index
        assert (result.start, result.new_start, result.stop) == (
            window.start,
            window.new_start,
            window.stop,
        )
        assert result.recomputed_steps == executed - window.num_new_steps
        assert result.plan.executed_steps == executed
        assert result.plan.strategy == "uniform:2"
        assert len(result.plan.schedule) == len(list(result.plan.schedule))
        assert result.loss.shape == ()
        assert not result.loss.requires_grad
        assert all(s.grad_fn is None and not s.requires_grad for s in result.state)
        assert result.updated
        assert result.seconds > 0
        assert result.peak_bytes is None or result.peak_bytes > 0
        with pytest.raises(AttributeError):
            result.loss = None


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "loss_fn", [mean_loss, lambda y, target: (mean_loss(y, target, reduction="sum"), 6.0)]
)
@pytest.mark.parametrize("make", [lstm, tanh_cell])
def test_the_loss_of_a_window_keeps_no_outputs_alive(make: Any, loss_fn: Any, reduction: str):
    """`mse_loss` leaves its mean in memory as large as the outputs."""
    _, targets = random_data(NUM_STEPS)
    assert mean_loss(targets, targets).untyped_storage().nbytes() > 8, "nothing is left to test"
    for window in TBPTT(make(), loss_fn, 6, 6, reduction=reduction).windows(data()):
        assert window.loss is not None
        assert window.loss.untyped_storage().nbytes() == window.loss.nbytes


def test_fields_of_a_run() -> None:
    module = tanh_cell()
    tbptt = TBPTT(module, mean_loss, K1, K2)
    last = observe(tbptt, data(), parameters=module.parameters())[-1]
    result = tbptt.train(data())
    assert isinstance(result, TrainResult)
    assert isinstance(result.loss, float)
    assert (result.num_steps, result.num_windows) == (NUM_STEPS, 5)
    assert bitwise(result.state, last.state)
    assert result.seconds > 0
    assert result.tokens_per_second == pytest.approx(NUM_STEPS * LANES / result.seconds)


def test_tokens_are_valid_steps_of_lanes() -> None:
    module, (inputs, targets) = tanh_cell(), random_data(NUM_STEPS)
    weight = torch.ones(NUM_STEPS, LANES)
    weight[5:, 1] = 0
    result = TBPTT(module, mean_loss, K1, K2).train(TensorSequence(inputs, targets, weight=weight))
    tokens = NUM_STEPS * LANES - (NUM_STEPS - 5)
    assert result.tokens_per_second == pytest.approx(tokens / result.seconds)


def test_final_state_can_be_handed_to_the_next_run() -> None:
    """Two halves with the state in between, at frozen weights and k1 = k2, are one run."""
    (inputs, targets), half = random_data(12), 6
    module = tanh_cell()
    tbptt = TBPTT(module, mean_loss, 3, 3, reduction="sum")
    tbptt.train(TensorSequence(inputs, targets))
    whole = gradients(list(module.parameters()))
    clear_gradients(list(module.parameters()))
    first = tbptt.train(TensorSequence(inputs[:half], targets[:half]))
    second = tbptt.train(TensorSequence(inputs[half:], targets[half:]), first.state)
    assert relative_error(gradients(list(module.parameters())), whole) <= 1e-12
    assert bitwise(second.state, tbptt.train(TensorSequence(inputs, targets)).state)


@pytest.mark.filterwarnings("ignore:.* misses parameters")
def test_a_function_with_parameters_in_the_loss_is_trained_too() -> None:
    """A loss module's parameters belong to the run, and its gradients are cleared with it."""

    class Readout(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH_IN)

        def forward(self, y: Tensor, target: Tensor) -> Tensor:
            return F.mse_loss(self.linear(y), target[..., :WIDTH_IN])

    def run(num_runs: int) -> list[Tensor | None]:
        torch.manual_seed(3)
        module, readout = tanh_cell(), Readout().double()
        parameters = [*module.parameters(), *readout.parameters()]
        optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
        tbptt = TBPTT(module, readout, K1, K2, optimizer)
        for _ in range(num_runs):
            tbptt.train(data())
        return gradients(parameters)

    assert all(grad is not None for grad in run(1))
    assert bitwise(run(2), run(1))


class DelayedCell(nn.Module):
    """Shows the state before the step, so that a window's first output has no graph."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = tanh_cell()

    def forward(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return state, self.cell(inputs, state)[1]


@pytest.mark.parametrize("strategy", ["retain", "step", "uniform:2"])
@pytest.mark.parametrize("executor", ["replay", "checkpoint"])
def test_a_window_whose_only_loss_is_a_constant_adds_no_gradient(
    strategy: str, executor: str
) -> None:
    """Of the second window only the first step counts, and what it shows is the state given."""
    (inputs, targets), init = random_data(6), torch.zeros(LANES, WIDTH, dtype=torch.float64)
    weight = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    module, plain = DelayedCell(), DelayedCell()
    sequence = TensorSequence(inputs, targets, weight=weight)
    TBPTT(module, mean_loss, 3, 3, strategy=strategy, executor=executor).train(sequence, init)
    state, losses = init, []
    for t in range(3):
        y, state = plain(inputs[t], state)
        losses.append(mean_loss(y, targets[t]))
    torch.stack(losses).mean().backward()
    for found, expected in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=0, atol=1e-12)
