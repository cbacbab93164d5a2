"""What happens between a window's gradient and the next window: clip, scale, step, schedule."""

from __future__ import annotations

import functools
from typing import Any

import naive
import pytest
import torch
from cases import (
    EXECUTORS,
    OVERLAPS,
    bitwise,
    gradients,
    lstm_cell,
    mean_loss,
    naive_problem,
    random_data,
    random_state,
    relative_error,
    tanh_cell,
)
from devices import here
from models_for_tests import check_same_windows, moving, observe
from small_runs import K1, K2, NUM_STEPS, data, run
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from tbptt_ckpt import TBPTT, TensorSequence, tbptt_windows

pytestmark = pytest.mark.usefixtures("device")

# Clipping


@pytest.mark.parametrize("executor", EXECUTORS)
def test_clipped_gradients_equal_a_naive_loop_and_are_what_is_yielded(executor: str) -> None:
    limit = 0.05
    reference, (inputs, targets) = tanh_cell(), random_data(NUM_STEPS)
    problem = naive_problem(reference, inputs, targets, None)
    own = moving(reference)
    expected = []
    for window in naive.refresh(problem, K1, K2):
        nn.utils.clip_grad_norm_(reference.parameters(), limit)
        expected.append((window, gradients(list(reference.parameters()))))
        own.step()

    module = tanh_cell()
    tbptt = TBPTT(
        module, mean_loss, K1, K2, moving(module), clip_grad_norm=limit, executor=executor
    )
    for result, (window, clipped) in zip(tbptt.windows(data()), expected, strict=True):
        actual = gradients(list(module.parameters()))
        assert relative_error(actual, clipped) <= 1e-12
        assert torch.stack([g.norm() for g in actual]).norm() <= limit * (1 + 1e-6)
        assert relative_error([result.loss], [window.loss]) <= 1e-12
    assert relative_error(list(module.parameters()), list(reference.parameters())) <= 1e-12


class _Looking(nn.Module):
    """Adds the rows of words that steps name."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.rows = nn.Embedding(7, 3, sparse=sparse, dtype=torch.float64)

    def forward(self, words: torch.Tensor, state: torch.Tensor) -> Any:
        state = torch.tanh(state + self.rows(words))
        return state, state


@pytest.mark.parametrize("strategy", ["retain", "uniform:2"])
def test_sparse_gradients_are_clipped_as_dense_ones(strategy: str) -> None:
    words, targets = torch.arange(24).reshape(8, 3) % 5, torch.ones(8, 3, 3, dtype=torch.float64)

    def trained(sparse: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        module = _Looking(sparse)
        options: dict[str, Any] = {"clip_grad_norm": 0.01, "strategy": strategy}
        sgd = torch.optim.SGD(module.parameters(), 0.1)
        tbptt = TBPTT(module, nn.functional.mse_loss, 2, 4, sgd, **options)
        tbptt.train(TensorSequence(words, targets), torch.zeros(3, 3, dtype=torch.float64))
        return [module.rows.weight]

    assert relative_error(trained(sparse=True), trained(sparse=False)) <= 1e-12


def test_a_limit_above_the_norm_changes_nothing() -> None:
    def run(**clip: float) -> list[Any]:
        module = tanh_cell()
        tbptt = TBPTT(module, mean_loss, K1, K2, moving(module), **clip)
        return observe(tbptt, data(), parameters=module.parameters())

    check_same_windows(run(clip_grad_norm=1e6), run())


@pytest.mark.filterwarnings("ignore:.* misses parameters")
def test_clipping_takes_the_norm_of_the_optimizers_parameters_only() -> None:
    module = tanh_cell()
    optimizer = torch.optim.SGD(module.readout.parameters(), lr=0.1)
    tbptt = TBPTT(module, mean_loss, K1, K2, optimizer, clip_grad_norm=0.01)
    for _ in tbptt.windows(data()):
        clipped = torch.stack([p.grad.norm() for p in module.readout.parameters()]).norm()
        assert float(clipped) == pytest.approx(0.01, rel=1e-4)
        assert module.recurrence.weight.grad.norm() > 0.01


# Schedulers


def test_scheduler_steps_once_per_update() -> None:
    module, (inputs, targets) = tanh_cell(), random_data(NUM_STEPS)
    optimizer = moving(module, lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.1)
    # The second of five windows has no target and makes no update.
    steps = [(inputs[t], None if 3 <= t < 6 else targets[t]) for t in range(NUM_STEPS)]
    tbptt = TBPTT(module, mean_loss, K1, K2, optimizer, scheduler=scheduler)
    rates = [optimizer.param_groups[0]["lr"] for _ in tbptt.windows(steps)]
    assert rates == pytest.approx([1.0, 1.0, 0.1, 0.1, 0.01])
    assert scheduler.last_epoch == 4


def test_plateau_scheduler_is_given_the_loss_of_each_window() -> None:
    module, seen = tanh_cell(), []
    optimizer = moving(module)

    class Listening(torch.optim.lr_scheduler.ReduceLROnPlateau):
        def step(self, metrics: Any, *args: Any, **kwargs: Any) -> None:
            seen.append(float(metrics))
            super().step(metrics, *args, **kwargs)

    # Never content: every step halves the rate.
    scheduler = Listening(optimizer, patience=0, threshold=1e9, factor=0.5)
    tbptt = TBPTT(module, mean_loss, K1, K2, optimizer, scheduler=scheduler)
    losses = [float(window.loss) for window in tbptt.windows(data())]
    assert seen == losses
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2 * 0.5 ** len(losses))


# Gradient scaling


def scaler(initial_scale: float = 2.0**12, **options: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler(here().type, init_scale=initial_scale, **options)


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_scaled_gradients_are_the_same_when_yielded(
    overlap: str, executor: str, clip: float | None
) -> None:
    def run(own_scaler: Any) -> list[Any]:
        module, init = tanh_cell(), random_state().requires_grad_()
        tbptt = TBPTT(
            module,
            mean_loss,
            K1,
            K2,
            moving(module, init),
            overlap=overlap,
            executor=executor,
            strategy="uniform:2",
            clip_grad_norm=clip,
            scaler=own_scaler,
        )
        return observe(tbptt, data(), init, parameters=[*module.parameters(), init])

    check_same_windows(run(scaler()), run(None), tolerance=1e-12)


@pytest.mark.filterwarnings("ignore:.* misses parameters")
@pytest.mark.parametrize("executor", EXECUTORS)
def test_scaling_leaves_no_trace_outside_the_optimizer(executor: str) -> None:
    """Parameters and an initial state that the optimizer does not own."""

    def run(own_scaler: Any) -> list[Any]:
        module, init = tanh_cell(), random_state().requires_grad_()
        optimizer = torch.optim.SGD(module.readout.parameters(), lr=0.2)
        tbptt = TBPTT(module, mean_loss, K1, None, optimizer, executor=executor, scaler=own_scaler)
        return observe(tbptt, data(), init, parameters=[*module.parameters(), init])

    check_same_windows(run(scaler()), run(None), tolerance=1e-12)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_an_update_with_infinite_gradients_is_skipped(executor: str) -> None:
    module, (inputs, targets) = tanh_cell(), random_data(NUM_STEPS)
    targets[4] = float("inf")  # in the second of five windows
    optimizer = moving(module)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    own_scaler = scaler(8.0)
    tbptt = TBPTT(
        module,
        mean_loss,
        K1,
        K2,
        optimizer,
        scaler=own_scaler,
        scheduler=scheduler,
        executor=executor,
        clip_grad_norm=10.0,
        check_finite=False,  # the loss is infinite too
    )
    before, updated, scales, rates = [p.detach().clone() for p in module.parameters()], [], [], []
    for window in tbptt.windows(TensorSequence(inputs, targets)):
        now = [p.detach().clone() for p in module.parameters()]
        assert window.updated == (not bitwise(now, before))
        before = now
        updated.append(window.updated)
        scales.append(own_scaler.get_scale())
        rates.append(scheduler.get_last_lr()[0])
    assert updated == [True, False, True, True, True]
    assert scales == [8.0, 4.0, 4.0, 4.0, 4.0]
    assert rates == pytest.approx([0.1, 0.1, 0.05, 0.025, 0.0125])
    assert all(torch.isfinite(weights).all() for weights in before)


def test_growing_scales_do_not_show_in_the_gradients() -> None:
    def run(own_scaler: Any) -> list[Any]:
        module = tanh_cell()
        tbptt = TBPTT(module, mean_loss, K1, K2, moving(module), scaler=own_scaler)
        return observe(tbptt, data(), parameters=module.parameters())

    growing = scaler(2.0, growth_interval=1)
    check_same_windows(run(growing), run(None), tolerance=1e-12)
    assert growing.get_scale() == 2.0**6


def test_a_scaler_does_not_mind_windows_without_a_gradient() -> None:
    """Only the initial state is learned, and later windows do not reach it."""

    def run(own_scaler: Any) -> list[Any]:
        module, init = tanh_cell().requires_grad_(False), random_state().requires_grad_()
        optimizer = torch.optim.SGD([init], lr=0.2)
        tbptt = TBPTT(module, mean_loss, K1, K2, optimizer, scaler=own_scaler)
        return observe(tbptt, data(), init, parameters=[init])

    for one, other in zip(run(scaler()), run(None), strict=True):
        assert relative_error(one.weights, other.weights) <= 1e-12


def test_a_disabled_scaler_is_none() -> None:
    def run(own_scaler: Any) -> list[Any]:
        module = tanh_cell()
        tbptt = TBPTT(
            module, mean_loss, K1, K2, moving(module), scaler=own_scaler, clip_grad_norm=0.1
        )
        return observe(tbptt, data(), parameters=module.parameters())

    check_same_windows(run(torch.amp.GradScaler(here().type, enabled=False)), run(None))


# Who wants to see a step is called


NUM_UPDATES = len(tbptt_windows(NUM_STEPS, K1, K2))


@pytest.mark.parametrize("kind", ["pre", "post", "global pre", "global post"])
def test_hooks_of_a_step_are_called(kind: str) -> None:
    module, calls = tanh_cell(), []
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    register = {
        "pre": optimizer.register_step_pre_hook,
        "post": optimizer.register_step_post_hook,
        "global pre": register_optimizer_step_pre_hook,
        "global post": register_optimizer_step_post_hook,
    }[kind]
    handle = register(lambda *_: calls.append(kind))
    try:
        run(module, optimizer)
    finally:
        handle.remove()
    assert len(calls) == NUM_UPDATES


def test_a_profiler_sees_every_step() -> None:
    module = tanh_cell()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(module, torch.optim.SGD(module.parameters(), lr=0.1))
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["Optimizer.step#SGD.step"] == NUM_UPDATES


@pytest.mark.parametrize("where", ["instance", "class"])
def test_a_step_that_somebody_replaced_is_called(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Own(torch.optim.SGD):
        pass

    module, calls = tanh_cell(), []
    optimizer = Own(module.parameters(), lr=0.1)
    owner: Any = optimizer if where == "instance" else Own
    original = owner.step

    @functools.wraps(original)  # which also copies the marks that torch leaves on its wrapper
    def replaced(*args: Any) -> Any:
        calls.append(where)
        return original(*args)

    monkeypatch.setattr(owner, "step", replaced)
    run(module, optimizer)
    assert len(calls) == NUM_UPDATES


def test_adam_and_momentum_equal_a_naive_loop() -> None:
    inputs, targets = random_data(NUM_STEPS)
    for make in (
        lambda p: torch.optim.Adam(p, lr=0.05),
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    ):
        reference, module = lstm_cell(), lstm_cell()
        problem = naive_problem(reference, inputs, targets, None)
        for _ in naive.refresh(problem, K1, K2, optimizer=make(reference.parameters())):
            pass
        TBPTT(module, mean_loss, K1, K2, make(module.parameters())).train(data())
        assert relative_error(list(module.parameters()), list(reference.parameters())) <= 1e-10
