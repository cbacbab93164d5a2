"""States that are kept in fewer bits: which gradient that is, and what is still seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import (
    STRATEGIES,
    gradients,
    lstm_cell,
    mean_loss,
    random_data,
    random_state,
    relative_error,
    tanh_cell,
)
from torch import Tensor, nn

from tbptt_ckpt import (
    TBPTT,
    ArgumentError,
    TensorSequence,
    profile_window,
    run_window,
    verify,
)
from tbptt_ckpt.errors import ReplayMismatchError
from tbptt_ckpt.executor import ReplayExecutor
from tbptt_ckpt.profiling import MemoryReport, Workload
from tbptt_ckpt.profiling.configuration import Configuration
from tbptt_ckpt.profiling.rounding import rounding_error
from tbptt_ckpt.schedule.plan import plan_window
from tbptt_ckpt.schedule.strategies import parse_strategy

NUM_STEPS = 12
BF16, F32 = torch.bfloat16, torch.float32


def by_hand(module: nn.Module, data: tuple[Tensor, Tensor], state: Tensor, leaf: int) -> float:
    """Leaves of so many steps, each from the exact state before it as it is rounded.

    The gradient of a state goes to the one before as if nothing had been rounded. The last leaf
    begins with the state that was just reached, which is not rounded.
    """
    inputs, targets = data
    begins, exact = [], state
    for t, x in enumerate(inputs):
        if t % leaf == 0:
            is_kept = 0 < t < len(inputs) - leaf
            begins.append(exact.to(BF16).double() if is_kept else exact)
        with torch.no_grad():
            _, exact = module(x, exact)
    grad, loss = None, 0.0
    for number, begin in reversed(list(enumerate(begins))):
        leaf_state = begin.detach().requires_grad_()
        now, total = leaf_state, torch.zeros(()).double()
        for t in range(number * leaf, min((number + 1) * leaf, len(inputs))):
            y, now = module(inputs[t], now)
            total = total + F.mse_loss(y, targets[t]) / len(inputs)
        roots = [total] if grad is None else [total, now]
        torch.autograd.backward(roots, [None] if grad is None else [None, grad])
        grad, loss = leaf_state.grad, loss + float(total.detach())
    return loss


@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize("leaf", [1, 3, 4])
def test_the_gradient_is_that_of_leaves_from_rounded_states(
    tmp_path: Path, leaf: int, in_file: bool
) -> None:
    module, data, state = tanh_cell(), random_data(NUM_STEPS), random_state()
    expected_loss = by_hand(module, data, state, leaf)
    expected = gradients([*module.parameters()])
    module.zero_grad()
    executor = ReplayExecutor(tmp_path if in_file else None, state_dtype=BF16)
    how: Any = {"strategy": f"uniform:{leaf}", "executor": executor}
    window = run_window(module, mean_loss, *data, state, **how)
    assert relative_error(gradients([*module.parameters()]), expected) <= 1e-12
    assert window.loss_value == pytest.approx(expected_loss, rel=1e-12)
    module.zero_grad()
    run_window(module, mean_loss, *data, state, strategy=f"uniform:{leaf}")
    assert 1e-6 < relative_error(gradients([*module.parameters()]), expected) < 1e-2


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_states_are_exact_and_verify_says_how_far_the_gradient_is_off(strategy: str) -> None:
    module, (inputs, targets), how = lstm_cell(), random_data(NUM_STEPS), {"strategy": strategy}
    rounded = ReplayExecutor(state_dtype=F32)
    found = verify(module, mean_loss, inputs, targets, executor=rounded, **how)
    assert found.state_error == 0
    assert found.max_relative_error < 1e-6
    exact = verify(module, mean_loss, inputs, targets, **how)
    is_kept = strategy not in ("retain", "revolve:1")  # leaves of these begin at no kept state
    assert (found.max_relative_error > 1e3 * exact.max_relative_error) == is_kept
    assert "in float32" in str(found)


@pytest.mark.parametrize("kind", ["uniform:3", "retain"])
def test_a_profile_says_how_far_the_gradient_of_its_window_is_off(kind: str) -> None:
    module, (inputs, targets), state = tanh_cell(), random_data(NUM_STEPS), random_state()
    how: Any = {"k1": NUM_STEPS, "k2": NUM_STEPS, "strategy": kind, "repeats": 1}
    given = (module, mean_loss, inputs, targets, state)
    report = profile_window(*given, **how, executor=ReplayExecutor(state_dtype=BF16))
    assert profile_window(*given, **how).gradient_error is None
    with torch.no_grad():
        for x in inputs:  # the steps before the window that is measured, which are the same
            _, state = module(x, state)
    by_leaf = []
    for leaf in (3 if kind == "uniform:3" else NUM_STEPS, NUM_STEPS):
        by_hand(module, (inputs, targets), state, leaf)
        by_leaf.append(gradients([*module.parameters()]))
        module.zero_grad()
    found, exact = (torch.cat([grad.flatten() for grad in grads]) for grads in by_leaf)
    error = float((found - exact).norm() / exact.norm())
    assert report.gradient_error == pytest.approx(error, rel=1e-6, abs=1e-15)
    assert (error > 1e-6) == (kind == "uniform:3")
    assert MemoryReport.from_json(report.to_json()).gradient_error == report.gradient_error


def test_that_is_measured_of_a_plan_whatever_made_its_steps() -> None:
    inputs, targets = random_data(NUM_STEPS)
    work = Workload(
        tanh_cell(), mean_loss, inputs=inputs, targets=targets, init_state=random_state()
    )
    executor, cuts = ReplayExecutor(state_dtype=BF16), "uniform:3"
    windows = Configuration(strategy=cuts, k1=NUM_STEPS, k2=NUM_STEPS, executor=executor)
    plan = plan_window(parse_strategy(cuts), 0, 0, NUM_STEPS)
    errors = {
        form: rounding_error(work, windows, replace(plan, form=form))
        for form in ("auto", "compiled", "fused")  # the engine here compiles nothing
    }
    assert len(set(errors.values())) == 1
    assert errors["auto"] > 1e-6


def test_windows_go_on_from_exact_states() -> None:
    expected, module = tanh_cell(), tanh_cell()
    data, first = TensorSequence(*random_data(NUM_STEPS)), random_state()
    runs = []
    for each, executor in ((expected, "replay"), (module, ReplayExecutor(state_dtype=BF16))):
        tbptt = TBPTT(each, mean_loss, 3, 8, executor=executor, strategy="uniform:2")
        runs.append([window.state for window in tbptt.windows(data, first)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_integers_and_what_is_as_narrow_stay_as_they_are() -> None:
    def step(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        number, half, total = state
        total = total + x * half.to(x.dtype)
        return total, (number + (1 << 40), half, total)

    inputs = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    state = (torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.float16), inputs[0] * 0)
    executor = ReplayExecutor(state_dtype=BF16)
    window = run_window(
        step, mean_loss, inputs, inputs.detach() + 1, state, strategy="step", executor=executor
    )
    assert (window.state[0] == 6 << 40).all()
    assert window.state[1].dtype == torch.float16


class Counting(nn.Module):
    """Adds what it has counted on itself, which no replay puts back."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls = nn.Linear(2, 3).double(), 0

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        state = torch.tanh(self.inner(x) + state + 0.01 * self.calls)
        return state, state


@pytest.mark.parametrize("strategy", ["uniform:2", "sqrt", "revolve:2"])
def test_what_a_module_keeps_elsewhere_is_found_by_the_first_leaf(strategy: str) -> None:
    executor = ReplayExecutor(state_dtype=BF16)
    with pytest.raises(ReplayMismatchError):
        run_window(
            Counting(),
            mean_loss,
            *random_data(NUM_STEPS),
            random_state(),
            strategy=strategy,
            executor=executor,
        )


class Later(Counting):
    """Differs when it runs again, but for the last two of 22 calls: those of the first leaf."""

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        again = NUM_STEPS < self.calls <= 20
        state = torch.tanh(self.inner(x) + state + 0.01 * again)
        return state, state


def test_a_leaf_that_begins_at_a_rounded_state_is_not_compared() -> None:
    data, how = random_data(NUM_STEPS), {"strategy": "uniform:2"}
    with pytest.raises(ReplayMismatchError):
        run_window(Later(), mean_loss, *data, random_state(), **how)
    unseen = Later()
    rounded = ReplayExecutor(state_dtype=BF16)
    run_window(unseen, mean_loss, *data, random_state(), executor=rounded, **how)
    assert unseen.calls > 20  # the steps that differ have run


def test_a_budget_keeps_more_states_in_fewer_bits() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.speed = nn.Parameter(torch.tensor(0.1))

        def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            state = state + self.speed * (state.roll(1, 1) - state)
            return state[:, :1] + x, state

    data, state = TensorSequence(*torch.randn(2, 64, 4, 1)), torch.randn(4, 4096)
    executed = []
    for dtype in (None, BF16):
        how = {"memory_budget": 14 * state.nbytes, "measure_memory": True}
        tbptt = TBPTT(
            Wide(), mean_loss, 64, None, executor=ReplayExecutor(state_dtype=dtype), **how
        )
        (window,) = tbptt.windows(data, state)
        assert window.peak_bytes is not None
        assert window.peak_bytes <= 14 * state.nbytes
        executed.append(window.plan.executed_steps)
    assert executed[1] < executed[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int8, torch.complex64])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ArgumentError, match=f"state_dtype={dtype} must be torch.bfloat16"):
        ReplayExecutor(state_dtype=dtype)
