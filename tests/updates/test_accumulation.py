"""Several windows per update: a plain loop that steps after every n-th backward."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import naive
import pytest
import torch
from cases import (
    EXECUTORS,
    OVERLAPS,
    bitwise,
    engine_sequence,
    gradients,
    lstm,
    mean_loss,
    naive_problem,
    random_data,
    random_state,
    relative_error,
    tanh_cell,
    twin,
)
from grids import covering
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, ArgumentError, TensorSequence
from tbptt_ckpt.trainer.options import NonFinite
from tbptt_ckpt.trainer.trainer import Trainer

NUM_STEPS = 9
WINDOWS = [(1, 1), (2, 2), (2, 5), (3, 1), (4, None)]


class EveryNth:
    """An optimizer that steps at every n-th call, with the mean or the sum of the gradients."""

    def __init__(self, optimizer: torch.optim.Optimizer, num_windows: int, averages: bool) -> None:
        self.optimizer, self.num_windows, self.averages = optimizer, num_windows, averages
        self.calls = 0

    def step(self) -> None:
        self.calls += 1
        if self.calls == self.num_windows:
            self.flush()

    def flush(self) -> None:
        for group in self.optimizer.param_groups if self.calls else ():
            for parameter in group["params"]:
                if parameter.grad is not None and self.averages:
                    parameter.grad /= self.calls
        if self.calls:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.calls = 0


def weights_of(module: nn.Module, init: Any) -> list[Tensor]:
    return [p.detach().clone() for p in (*module.parameters(), *naive.tensors(init))]


def optimizer_of(module: nn.Module, init: Any) -> torch.optim.Optimizer:
    parameters = [*module.parameters(), *naive.tensors(init)]
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.5)


@covering(
    num_windows=[1, 2, 3, 4, 20],
    reduction=["mean", "sum"],
    overlap=OVERLAPS,
    absent=[(), (0, 1, 4, 5, 8)],
)
def test_updates_equal_a_loop_that_steps_every_nth_time(
    num_windows: int, reduction: str, overlap: str, absent: tuple[int, ...]
) -> None:
    inputs, targets = random_data(NUM_STEPS)
    plans = itertools.cycle(itertools.product(("step", "uniform:2", "retain"), EXECUTORS))
    for (k1, k2), make, (strategy, executor) in zip(
        WINDOWS * 2, [tanh_cell] * 5 + [lstm] * 5, plans, strict=False
    ):
        init = random_state() if make is tanh_cell else (random_state()[None],) * 2
        init = naive.mapped(lambda t: t.clone().requires_grad_(), init)
        module = make()
        other, other_init = twin(module, init)
        tbptt = TBPTT(
            module,
            mean_loss,
            k1,
            k2,
            optimizer_of(module, init),
            reduction=reduction,
            overlap=overlap,
            strategy=strategy,
            executor=executor,
            accumulate=num_windows,
        )
        stepper = EveryNth(optimizer_of(other, other_init), num_windows, reduction == "mean")
        extra = naive.tensors(other_init)
        problem = naive_problem(
            other, inputs, targets, other_init, absent=absent, extra_parameters=extra
        )
        expected = naive.OVERLAPS[overlap](
            problem, k1, k2, reduction=reduction, optimizer=stepper, zero_grad=False
        )
        where = (k1, k2, strategy, executor)
        num_updates = 0
        sequence = engine_sequence(inputs, targets, absent=absent)
        for window, one in zip(tbptt.windows(sequence, init), expected, strict=True):
            num_updates += window.updated
            assert (window.loss is None) == (one.loss is None), where
            if window.loss is not None:
                assert relative_error([window.loss], [one.loss]) <= 1e-12, where
            if window.stop == NUM_STEPS:
                stepper.flush()
            found = weights_of(module, init)
            assert relative_error(found, weights_of(other, other_init)) <= 1e-12, where
            state, other_state = naive.tensors(window.state), naive.tensors(one.state)
            assert relative_error(state, other_state) <= 1e-12, where
        losses = [t not in absent for t in range(NUM_STEPS)]
        with_loss = sum(any(losses[t : t + k1]) for t in range(0, NUM_STEPS, k1))
        assert num_updates == -(-with_loss // num_windows), where


def test_windows_of_frozen_weights_average_to_one_long_window() -> None:
    inputs, targets = random_data(8)
    found = []
    for k1, accumulate in ((2, 4), (4, 2), (8, 1)):
        module = tanh_cell()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
        tbptt = TBPTT(module, mean_loss, k1, None, optimizer, accumulate=accumulate)
        tbptt.train(TensorSequence(inputs, targets))
        found.append(gradients(list(module.parameters())))
    assert relative_error(found[0], found[2]) <= 1e-12
    assert relative_error(found[1], found[2]) <= 1e-12


def test_one_window_per_update_is_the_default() -> None:
    inputs, targets = random_data(NUM_STEPS)
    runs = []
    for given in ({}, {"accumulate": 1}):
        module = tanh_cell()
        tbptt = TBPTT(module, mean_loss, 2, 4, torch.optim.Adam(module.parameters()), **given)
        tbptt.train(TensorSequence(inputs, targets))
        runs.append(list(module.parameters()))
    assert bitwise(*runs)


def test_an_update_clips_and_schedules_once_with_what_it_averaged() -> None:
    inputs, targets = random_data(NUM_STEPS)
    norm, seen = 0.01, []

    class Optimizer(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            seen.append(gradients(list(module.parameters())))
            return super().step(closure)

    module = tanh_cell()
    optimizer = Optimizer(module.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    tbptt = TBPTT(
        module,
        mean_loss,
        2,
        2,
        optimizer,
        clip_grad_norm=norm,
        scheduler=scheduler,
        accumulate=2,
    )
    updated = [w.updated for w in tbptt.windows(TensorSequence(inputs, targets))]
    assert updated == [False, True, False, True, True]  # five windows, the last one alone
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 8)
    for grads in seen:
        assert float(torch.cat([g.flatten() for g in grads]).norm()) == pytest.approx(
            norm, rel=1e-3
        )


def test_a_schedule_by_loss_sees_the_mean_of_the_group() -> None:
    class Plateau(torch.optim.lr_scheduler.ReduceLROnPlateau):
        def step(self, metrics: float, epoch: int | None = None) -> None:
            seen.append(metrics)

    seen: list[float] = []
    module = tanh_cell()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    tbptt = TBPTT(module, mean_loss, 2, 2, optimizer, scheduler=Plateau(optimizer), accumulate=2)
    losses = [float(w.loss) for w in tbptt.windows(TensorSequence(*random_data(6)))]
    assert seen == pytest.approx([(losses[0] + losses[1]) / 2, losses[2]])


def test_a_scaler_scales_a_whole_group() -> None:
    inputs, targets = random_data(NUM_STEPS)
    found = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        module, init = tanh_cell(), random_state().requires_grad_()  # not the optimizer's
        tbptt = TBPTT(
            module,
            mean_loss,
            2,
            NUM_STEPS,
            torch.optim.SGD(module.parameters(), lr=0.1),
            scaler=scaler,
            accumulate=3,
        )
        grads = [
            init.grad.clone()
            for w in tbptt.windows(TensorSequence(inputs, targets), init)
            if w.updated
        ]
        found.append([*grads, *module.parameters()])
    assert relative_error(found[1], found[0]) <= 1e-12


def test_a_run_that_is_left_leaves_no_gradients_to_the_next() -> None:
    inputs, targets = random_data(NUM_STEPS)
    module = tanh_cell()
    other, _ = twin(module, None)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    tbptt = TBPTT(module, mean_loss, 2, 2, optimizer, accumulate=3)
    next(iter(tbptt.windows(TensorSequence(inputs, targets))))
    tbptt.train(TensorSequence(inputs, targets))
    fresh = TBPTT(other, mean_loss, 2, 2, torch.optim.SGD(other.parameters(), lr=0.0), accumulate=3)
    fresh.train(TensorSequence(inputs, targets))
    assert bitwise(gradients(list(module.parameters())), gradients(list(other.parameters())))


@pytest.mark.parametrize("accumulate", [0, -1, 1.5, True, None])
def test_numbers_of_windows_that_cannot_work_are_named(accumulate: Any) -> None:
    module = tanh_cell()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with pytest.raises(ArgumentError, match="accumulate="):
        TBPTT(module, mean_loss, 1, 1, optimizer, accumulate=accumulate)


def test_accumulation_without_an_optimizer_is_named() -> None:
    with pytest.raises(ArgumentError, match="accumulate=2 needs an optimizer"):
        TBPTT(tanh_cell(), mean_loss, 1, 1, accumulate=2)


# Faults within a group


class Fails:
    """Calls a function; the n-th call runs out of memory, before or after its work."""

    def __init__(self, function: Any, number: int, after: bool = False) -> None:
        self.function, self.number, self.after, self.calls = function, number, after, 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        if self.calls == self.number and not self.after:
            raise torch.OutOfMemoryError("out of memory, on purpose")
        result = self.function(*args)
        if self.calls == self.number:
            raise torch.OutOfMemoryError("out of memory, on purpose")
        return result


def trained(loss_fn: Any, *, failing_step: int = 0, after: bool = False) -> list[Tensor]:
    module, init = tanh_cell(), random_state().requires_grad_()
    optimizer = optimizer_of(module, init)
    optimizer.step = Fails(optimizer.step, failing_step, after)  # type: ignore[method-assign]
    tbptt = TBPTT(module, loss_fn, 2, 5, optimizer, strategy="uniform:4", accumulate=3)
    Trainer(tbptt, TensorSequence(*random_data(13)), init_state=init).train()
    if failing_step:
        assert optimizer.step.calls > failing_step, "the fault fired, and the step came again"
    return [*module.parameters(), init]


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_missing_memory_at_every_loss_loses_no_window_of_a_group(stride: int) -> None:
    counted = Fails(mean_loss, 0)
    expected = trained(counted)
    for number in range(1, counted.calls + 1, stride):
        with pytest.warns(UserWarning, match="memory"):
            found = trained(Fails(mean_loss, number))
        assert relative_error(found, expected) <= 1e-12, number


@pytest.mark.parametrize("after", [False, True])
def test_missing_memory_in_every_update_of_a_group_is_made_up_for(after: bool) -> None:
    expected = trained(mean_loss)
    for number in (1, 2, 3):  # seven windows: groups of three, three and one
        with pytest.warns(UserWarning, match="memory"):
            found = trained(mean_loss, failing_step=number, after=after)
        assert relative_error(found, expected) <= 1e-12, number


@pytest.mark.parametrize("window", range(5))
def test_a_window_that_is_skipped_leaves_its_group_alone(window: int) -> None:
    inputs, targets = random_data(10)
    kept = [t for t in range(10) if t // 2 != window]
    found = []
    for x, y in ((inputs[kept], targets[kept]), (inputs, targets)):
        module = tanh_cell()
        y = y.clone()
        if len(y) == 10:
            y[2 * window] = float("nan")
        tbptt = TBPTT(module, mean_loss, 2, 2, optimizer_of(module, None), accumulate=3)
        trainer = Trainer(
            tbptt,
            TensorSequence(x, y),
            init_state=random_state(),
            non_finite=NonFinite(policy="skip"),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.train()
        found.append(list(module.parameters()))
    assert relative_error(found[1], found[0]) <= 1e-12
