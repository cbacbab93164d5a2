"""What happens between a window's gradient and the next window: clip, scale, step, schedule.

Also what is asked to leave results alone: autocast, gradient scaling, the caller's own
`no_grad`; and what a user reads off the results.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
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
    random_state,
    relative_error,
    tanh_cell,
)
from models_for_tests import CountedCalls, check_same_windows, moving, observe
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from tbptt_ckpt import TBPTT, TensorSequence, TrainResult, tbptt_windows
from tbptt_ckpt.data.blocks import StepBlock
from tbptt_ckpt.executor.runner import make_runner
from tbptt_ckpt.executor.sinks import OutputSink
from tbptt_ckpt.executor.task import WindowTask
from tbptt_ckpt.module.ambient import Ambient
from tbptt_ckpt.updates import optimizer_calls

NUM_STEPS, K1, K2 = 13, 3, 7
STRATEGIES = ("retain", "uniform:2", "revolve:2")


def data(num_steps: int = NUM_STEPS) -> TensorSequence:
    return TensorSequence(*random_data(num_steps))


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


def test_a_limit_above_the_norm_changes_nothing() -> None:
    def run(**clip: float) -> list[Any]:
        module = tanh_cell()
        tbptt = TBPTT(module, mean_loss, K1, K2, moving(module), **clip)
        return observe(tbptt, data(), parameters=module.parameters())

    check_same_windows(run(clip_grad_norm=1e6), run())


def test_clipping_takes_the_norm_of_the_optimizers_parameters_only() -> None:
    module = tanh_cell()
    optimizer = torch.optim.SGD(module.readout.parameters(), lr=0.1)
    tbptt = TBPTT(module, mean_loss, K1, K2, optimizer, clip_grad_norm=0.01)
    for _ in tbptt.windows(data()):
        clipped = torch.stack([p.grad.norm() for p in module.readout.parameters()]).norm()
        assert clipped == pytest.approx(0.01, rel=1e-4)
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
    return torch.amp.GradScaler("cpu", init_scale=initial_scale, **options)


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

    check_same_windows(run(torch.amp.GradScaler("cpu", enabled=False)), run(None))


# Autocast


def single_precision(module: nn.Module) -> tuple[nn.Module, Tensor, Tensor]:
    inputs, targets = random_data(NUM_STEPS)
    return module.float(), inputs.float(), targets.float()


def autocast_loop(
    module: nn.Module, inputs: Tensor, targets: Tensor
) -> Iterator[tuple[Tensor, list[Tensor | None]]]:
    """Overlapping windows from detached states with moving weights, all of each under autocast."""
    optimizer, states = moving(module), {0: None}
    for start, new_start, stop in naive.windows(NUM_STEPS, K1, K2):
        optimizer.zero_grad()
        state, losses = states[start], []
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for t in range(start, stop):
                y, state = module(inputs[t], state)
                states[t + 1] = naive.mapped(Tensor.detach, state)
                if t >= new_start:
                    losses.append(mean_loss(y, targets[t]))
            loss = torch.stack(losses).mean()
        loss.backward()
        yield loss.detach(), gradients(list(module.parameters()))
        optimizer.step()


@pytest.mark.parametrize("make", [tanh_cell, lstm_cell])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_autocast_equals_a_naive_loop_under_autocast(
    executor: str, strategy: str, make: Any
) -> None:
    module, inputs, targets = single_precision(make())
    tbptt = TBPTT(
        module,
        mean_loss,
        K1,
        K2,
        moving(module),
        autocast_dtype=torch.bfloat16,
        executor=executor,
        strategy=strategy,
    )
    seen = observe(tbptt, TensorSequence(inputs, targets), parameters=module.parameters())
    reference, _, _ = single_precision(make())
    for window, (loss, grads) in zip(seen, autocast_loop(reference, inputs, targets), strict=True):
        assert relative_error([window.loss], [loss]) <= 5e-3
        assert relative_error(window.grads, grads) <= 2e-2  # bfloat16 has 8 bits
    loss, grads = next(autocast_loop(single_precision(make())[0], inputs, targets))
    assert relative_error([seen[0].loss], [loss]) <= 1e-6  # before rounding has moved weights


def test_autocast_reaches_module_and_loss() -> None:
    module, inputs, targets = single_precision(tanh_cell())
    seen = []

    def loss_fn(y: Tensor, target: Tensor) -> Tensor:
        seen.append((y.dtype, torch.is_autocast_enabled("cpu")))
        return mean_loss(y, target)

    tbptt = TBPTT(module, loss_fn, K1, K2, autocast_dtype=torch.bfloat16)
    tbptt.train(TensorSequence(inputs, targets))
    assert set(seen) == {(torch.bfloat16, True)}
    assert not torch.is_autocast_enabled("cpu")
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


@pytest.mark.parametrize(("state", "inputs"), [("xpu", "cpu"), (None, "xpu"), (None, "cpu")])
def test_a_function_runs_under_the_autocast_of_what_it_is_given(
    state: str | None, inputs: str
) -> None:
    """A device's autocast can be entered without one, and fake tensors stand for its own."""
    device, other = ("cpu", "xpu") if "xpu" not in (state, inputs) else ("xpu", "cpu")
    seen = []

    def step(x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor | None]:
        seen.append((torch.is_autocast_enabled(device), torch.is_autocast_enabled(other)))
        return x, h

    with FakeTensorMode():
        x = torch.empty(4, LANES, WIDTH, device=inputs)
        h = None if state is None else torch.empty(LANES, WIDTH, device=state)
        task = WindowTask([StepBlock(0, 4, x, x, None, 0)], 0, 0, 4, 0, Ambient([], []))
        make_runner(step, None, 0, torch.bfloat16).run(task, 0, 4, h, OutputSink())
    assert seen == [(True, False)] * 4


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_inside_the_callers_autocast_every_weight_has_a_gradient(
    executor: str, overlap: str, strategy: str, dtype: torch.dtype | None
) -> None:
    """Autocast caches cast weights; one cached without a graph would have no gradient."""
    module, inputs, targets = single_precision(lstm_cell())
    tbptt = TBPTT(
        module,
        mean_loss,
        K1,
        K2,
        moving(module),
        overlap=overlap,
        executor=executor,
        strategy=strategy,
        autocast_dtype=dtype,
    )
    sequence = TensorSequence(inputs, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            module(inputs[0], None)  # fills the cache
        inside = observe(tbptt, sequence, parameters=module.parameters())
    other, _, _ = single_precision(lstm_cell())
    tbptt = TBPTT(
        other,
        mean_loss,
        K1,
        K2,
        moving(other),
        overlap=overlap,
        executor=executor,
        strategy=strategy,
        autocast_dtype=torch.bfloat16,
    )
    assert all(grad is not None and grad.any() for window in inside for grad in window.grads)
    check_same_windows(inside, observe(tbptt, sequence, parameters=other.parameters()))


def test_autocast_after_the_run_still_trains_the_callers_own_steps() -> None:
    """Nothing of the run stays in the cache of the autocast around it."""
    module, inputs, targets = single_precision(tanh_cell())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        TBPTT(module, mean_loss, K1, K2).train(TensorSequence(inputs, targets))
        clear_gradients(list(module.parameters()))
        y, _ = module(inputs[0], None)
        loss = mean_loss(y, targets[0])
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())


# Who wants to see a step is called


NUM_UPDATES = len(tbptt_windows(NUM_STEPS, K1, K2))


def test_an_unseen_step_is_run_without_torchs_wrapper(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("torch's wrapper was called")

    monkeypatch.setattr(torch.optim.Optimizer, "_optimizer_step_code", fail)
    module = tanh_cell()
    before = [p.detach().clone() for p in module.parameters()]
    run(module, torch.optim.SGD(module.parameters(), lr=0.1))
    assert relative_error(list(module.parameters()), before) > 1e-6


def test_a_wrapper_that_is_not_known_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    def note(optimizer: object) -> None:
        calls.append(optimizer)

    monkeypatch.setattr(torch.optim.Optimizer, "_optimizer_step_code", note)
    monkeypatch.setattr(optimizer_calls, "_WRAPPER", None)
    module = tanh_cell()
    run(module, torch.optim.SGD(module.parameters(), lr=0.1))
    assert len(calls) == NUM_UPDATES


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


def run(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    TBPTT(module, mean_loss, K1, K2, optimizer).train(data())


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
    tbptt = TBPTT(module, mean_loss, K1, K2, moving(module), strategy="retain")
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


# Learned initial states


@pytest.mark.parametrize("optimized", [True, False])
@pytest.mark.parametrize("k2", [2, 7, None])
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_learned_initial_state(
    overlap: str, executor: str, k2: int | None, optimized: bool
) -> None:
    """In the optimizer it moves with the weights; outside it only gets its gradients."""

    def learned() -> nn.Parameter:
        return nn.Parameter(random_state())

    inputs, targets = random_data(NUM_STEPS)
    reference, init = tanh_cell(), learned()
    problem = naive_problem(reference, inputs, targets, init, extra_parameters=[init])
    optimizer = moving(reference, *([init] if optimized else []))
    expected = list(naive.OVERLAPS[overlap](problem, K1, k2, optimizer=optimizer))

    module, init = tanh_cell(), learned()
    optimizer = moving(module, *([init] if optimized else []))
    tbptt = TBPTT(
        module,
        mean_loss,
        K1,
        k2,
        optimizer,
        overlap=overlap,
        executor=executor,
        strategy="uniform:2",
    )
    for result, window in zip(tbptt.windows(data(), init), expected, strict=True):
        grads = gradients([*module.parameters(), init])
        check_window("learned", result, grads, window, bitwise_state=False)
        assert (init.grad is None) == (result.start > 0)
    has_moved = not bitwise(init, random_state())
    assert has_moved == (optimized and k2 != 2)  # k2 < k1 never reaches back to the start


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_initial_state_computed_by_a_layer(overlap: str, executor: str) -> None:
    """With a graph of its own, and gradients that accumulate."""
    inputs, targets = random_data(NUM_STEPS)

    def encoder() -> nn.Linear:
        torch.manual_seed(5)
        return nn.Linear(4, WIDTH).double()

    context = torch.linspace(-1, 1, LANES * 4, dtype=torch.float64).view(LANES, 4)
    reference, layer = tanh_cell(), encoder()
    leaf = layer(context).detach().requires_grad_()
    problem = naive_problem(reference, inputs, targets, leaf)
    for _ in naive.OVERLAPS[overlap](problem, K1, None, zero_grad=False):
        pass
    layer(context).backward(leaf.grad)
    expected = gradients([*reference.parameters(), *layer.parameters()])

    module, layer = tanh_cell(), encoder()
    tbptt = TBPTT(module, mean_loss, K1, None, overlap=overlap, executor=executor)
    tbptt.train(data(), layer(context))
    actual = gradients([*module.parameters(), *layer.parameters()])
    assert relative_error(actual, expected) <= 1e-12


@pytest.mark.parametrize("computed", [False, True])
def test_one_tensor_in_two_places_of_the_initial_state(computed: bool) -> None:
    """It gets the gradients of both places, each once."""

    def start(leaf: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.sin(leaf) if computed else leaf
        return h, h

    inputs, targets = random_data(NUM_STEPS)
    reference, leaf = lstm_cell(), random_state().requires_grad_()
    expected = torch.zeros_like(leaf)
    for _, new_start, stop in naive.windows(NUM_STEPS, K1, None):
        state, losses = start(leaf), []
        for step in range(stop):
            y, state = reference(inputs[step], state)
            losses.append(mean_loss(y, targets[step]))
        expected += torch.autograd.grad(sum(losses[new_start:]) / (stop - new_start), leaf)[0]

    module, leaf = lstm_cell(), random_state().requires_grad_()
    TBPTT(module, mean_loss, K1, None).train(data(), start(leaf))
    assert relative_error([leaf.grad], [expected]) <= 1e-12


def test_initial_state_is_not_changed_by_a_run() -> None:
    module, init = tanh_cell(), random_state()
    TBPTT(module, mean_loss, K1, K2, moving(module)).train(data(), init)
    assert bitwise(init, random_state())
    assert init.grad is None


# Frozen parameters, inputs that require grad


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_frozen_parameters_get_no_gradient(strategy: str, executor: str) -> None:
    inputs, targets = random_data(NUM_STEPS)

    def frozen() -> nn.Module:
        module = tanh_cell()
        module.readout.requires_grad_(False)
        return module

    reference, module = frozen(), frozen()
    problem = naive_problem(reference, inputs, targets, None)
    own = torch.optim.SGD([p for p in reference.parameters() if p.requires_grad], lr=0.2)
    expected = naive.refresh(problem, K1, K2, optimizer=own)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.2)
    tbptt = TBPTT(module, mean_loss, K1, K2, optimizer, strategy=strategy, executor=executor)
    for result, window in zip(tbptt.windows(data()), expected, strict=True):
        assert all(p.grad is None for p in module.readout.parameters())
        grads = gradients(list(module.parameters()))
        check_window("frozen", result, grads, window, bitwise_state=False)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_only_the_initial_state_is_learned(strategy: str, executor: str) -> None:
    module, (inputs, targets) = tanh_cell().requires_grad_(False), random_data(NUM_STEPS)
    init = random_state().requires_grad_()
    problem = naive_problem(module, inputs, targets, init, extra_parameters=[init])
    *_, expected = naive.refresh(problem, K1, None, zero_grad=False)
    init = random_state().requires_grad_()
    TBPTT(module, mean_loss, K1, None, strategy=strategy, executor=executor).train(data(), init)
    assert relative_error([init.grad], expected.grads[-1:]) <= 1e-12


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_to_learn_is_no_error(strategy: str, executor: str) -> None:
    module = tanh_cell().requires_grad_(False)
    result = TBPTT(module, mean_loss, K1, K2, strategy=strategy, executor=executor).train(data())
    assert result.loss is not None
    assert all(p.grad is None for p in module.parameters())


def learned_inputs(kind: str) -> tuple[list[Tensor], Any]:
    """Leaf tensors that require grad, and the sequence that they are the inputs of."""
    inputs, targets = random_data(NUM_STEPS)
    if kind == "tensor":
        return [inputs.requires_grad_()], TensorSequence(inputs, targets)
    steps = [x.clone().requires_grad_() for x in inputs]
    pairs = list(zip(steps, targets, strict=True))
    return steps, (pairs if kind == "list" else iter(pairs))


@pytest.mark.parametrize("kind", ["tensor", "list", "generator"])
@pytest.mark.parametrize("k2", [4, None])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_leaf_inputs_get_the_gradient_of_plain_bptt(
    executor: str, k2: int | None, kind: str
) -> None:
    leaves, _ = learned_inputs("tensor")
    problem = naive_problem(tanh_cell(), leaves[0], random_data(NUM_STEPS)[1], None)
    for _ in naive.refresh(problem, K1, k2):
        pass
    expected = leaves[0].grad
    assert expected is not None
    leaves, sequence = learned_inputs(kind)
    tbptt = TBPTT(tanh_cell(), mean_loss, K1, k2, strategy="uniform:2", executor=executor)
    tbptt.train(sequence)
    actual = leaves[0].grad if kind == "tensor" else torch.stack([x.grad for x in leaves])
    assert relative_error([actual], [expected]) <= 1e-12


def test_leaf_inputs_of_a_segment_module_get_the_gradient_of_plain_bptt() -> None:
    inputs, targets = random_data(NUM_STEPS)
    inputs.requires_grad_()
    mean_loss(lstm()(inputs)[0], targets).backward()
    expected, inputs.grad = inputs.grad, None
    TBPTT(lstm(), mean_loss, NUM_STEPS, None, strategy="uniform:4").train(
        TensorSequence(inputs, targets)
    )
    assert relative_error([inputs.grad], [expected]) <= 1e-12


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
    tbptt = TBPTT(module, mean_loss, K1, K2, moving(module), strategy="uniform:2")
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
