"""Schedules as data: valid for every size, run as written, and counted inside the module."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import (
    EXECUTORS,
    STRATEGIES,
    clear_gradients,
    gradients,
    lstm,
    mean_loss,
    random_data,
    random_state,
    relative_error,
    tanh_cell,
)
from grids import covering
from torch import Tensor, nn

from tbptt_ckpt import (
    TBPTT,
    Costs,
    Revolve,
    ScheduleError,
    TensorSequence,
    plan,
    run_window,
    tbptt_windows,
)
from tbptt_ckpt.executor.observer import ActionTrace, Observer
from tbptt_ckpt.schedule import Advance, Differentiate, Drop, Keep, Schedule
from tbptt_ckpt.schedule.actions import Action, check_schedule
from tbptt_ckpt.schedule.plan import plan_window
from tbptt_ckpt.schedule.strategies import parse_strategy
from tbptt_ckpt.schedule.windows import later_starts

REACHES = ((2, 5), (3, 3), (3, None), (4, 2), (5, 12), (14, 14), (20, 6))
NUM_STEPS = 14
# Griewank & Walther 2000: forward steps for 1000 steps with n states.
REVOLVE_COUNTS = {5: 7284, 10: 4636, 20: 3747, 40: 3097}


def executed_steps(schedule: Iterable[Action]) -> int:
    return sum(a.stop - a.start for a in schedule if isinstance(a, Advance | Differentiate))


# Where windows lie.


@pytest.mark.parametrize("k2", [*range(1, 12), None])
@pytest.mark.parametrize("k1", range(1, 6))
def test_later_starts_are_the_starts_of_later_windows_inside_a_window(
    k1: int, k2: int | None
) -> None:
    windows = tbptt_windows(17, k1, k2)
    for window in windows:
        later = {w.start for w in windows[window.index + 1 :]}
        inside = sorted(s for s in later if window.first < s <= window.stop)
        assert later_starts(window, 17, k1, k2) == inside


# The executors run what the schedule says.


def joints_of(window: Any, k1: int) -> list[int]:
    """Update points strictly inside a window's differentiated range."""
    return [t for t in range(k1, window.new_start + 1, k1) if window.start < t < window.stop]


@covering(
    together=1,
    strategy=[*STRATEGIES, "auto", "uniform:100", "revolve:20"],
    how=[("replay", "refresh"), ("checkpoint", "refresh"), ("replay", "stale")],
    make=[tanh_cell, lstm],
)
def test_recorded_actions_equal_the_schedule(
    strategy: str, how: tuple[str, str], make: Any
) -> None:
    executor, overlap = how
    inputs, targets = random_data(NUM_STEPS)
    for k1, k2 in REACHES:
        module = make()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        trace = ActionTrace()
        tbptt = TBPTT(
            module,
            mean_loss,
            k1,
            k2,
            optimizer,
            overlap=overlap,
            strategy=strategy,
            executor=executor,
            observer=trace,
        )
        results = list(tbptt.windows(TensorSequence(inputs, targets), None))
        planned = [action for result in results for action in result.plan.schedule]
        assert trace.actions == planned, (k1, k2)
        for result, window in zip(results, tbptt_windows(NUM_STEPS, k1, k2), strict=True):
            joints = joints_of(window, k1) if overlap == "stale" else []
            schedule = result.plan.schedule
            check_schedule(schedule, window.first, window.start, window.stop, joints)
            wanted = plan_window(
                parse_strategy(strategy), window.first, window.start, window.stop, joints
            )
            assert result.plan == wanted or result.plan.strategy == "optimal", (k1, k2, window)
            executed = executed_steps(schedule)
            assert result.plan.executed_steps == executed
            assert result.recomputed_steps == executed - window.num_new_steps


class CountingCell(nn.Module):
    """A small contracting cell that counts the steps it is asked to run."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrence = nn.Linear(2, 2)
        self.calls = 0

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        h = torch.tanh(self.recurrence(h) + x)
        return h, h


@covering(together=1, strategy=STRATEGIES, executor=EXECUTORS)
def test_the_module_runs_as_many_steps_as_the_results_say(strategy: str, executor: str) -> None:
    for overlap, (k1, k2) in itertools.product(("refresh", "stale"), REACHES):
        module = counting_cell()
        inputs, targets = counting_data(NUM_STEPS)
        how = {"overlap": overlap, "strategy": strategy, "executor": executor}
        # The check of replays runs a few steps once more, which are not the schedule's.
        tbptt = TBPTT(module, mean_loss, k1, k2, check_replays=False, **how)
        for result in tbptt.windows(TensorSequence(inputs, targets), torch.zeros(1, 2)):
            executed = result.recomputed_steps + result.stop - result.new_start
            assert module.calls == executed, (overlap, k1, k2, result.index)
            module.calls = 0


def counting_cell() -> CountingCell:
    torch.manual_seed(0)
    return CountingCell()


def counting_data(num_steps: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    inputs = 0.3 * torch.randn(num_steps, 1, 2, generator=generator)
    return inputs, torch.randn(num_steps, 1, 2, generator=generator)


@functools.cache
def plain_gradients(num_steps: int) -> list[Tensor]:
    module = counting_cell().double()
    inputs, targets = counting_data(num_steps)
    h, losses = torch.zeros(1, 2, dtype=torch.float64), []
    for x, target in zip(inputs.double(), targets.double(), strict=True):
        y, h = module(x, h)
        losses.append(F.mse_loss(y, target))
    (torch.stack(losses).sum() / num_steps).backward()
    return gradients(list(module.parameters()))


@covering(together=1, num_states=REVOLVE_COUNTS, executor=EXECUTORS)
def test_revolve_executes_the_published_number_of_steps(num_states: int, executor: str) -> None:
    module = counting_cell().double()
    inputs, targets = (data.double() for data in counting_data(1000))
    run = run_window(
        module,
        mean_loss,
        inputs,
        targets,
        torch.zeros(1, 2, dtype=torch.float64),
        strategy=f"revolve:{num_states}",
        executor=executor,
        check_replays=False,
    )
    assert module.calls == REVOLVE_COUNTS[num_states]
    assert run.executed_steps == REVOLVE_COUNTS[num_states]
    error = relative_error(gradients(list(module.parameters())), plain_gradients(1000))
    assert error <= 1e-12


def test_tbptt_runs_revolve_as_counted() -> None:
    """The same through the trainer, with every state of the window's reach kept by count."""
    module = counting_cell().double()
    inputs, targets = (data.double() for data in counting_data(1000))
    tbptt = TBPTT(module, mean_loss, 1000, None, strategy="revolve:20", check_replays=False)
    (result,) = tbptt.windows(
        TensorSequence(inputs, targets), torch.zeros(1, 2, dtype=torch.float64)
    )
    assert module.calls == REVOLVE_COUNTS[20]
    assert result.recomputed_steps == REVOLVE_COUNTS[20] - 1000
    assert relative_error(gradients(list(module.parameters())), plain_gradients(1000)) <= 1e-12


# Every strategy writes valid schedules.


@pytest.mark.parametrize(
    "strategy",
    [*STRATEGIES, "auto", *(f"uniform:{n}" for n in (1, 4, 7, 40)), "revolve:5", "revolve:40"],
)
def test_schedules_are_valid_for_every_size(strategy: str) -> None:
    chosen = parse_strategy(strategy)
    for first, length in itertools.product((0, 3), range(1, 41)):
        stop = first + length
        for start in {first, first + length // 2, stop - 1}:
            schedule = list(plan_window(chosen, first, start, stop).schedule)
            check_schedule(schedule, first, start, stop)
            assert kept_states(schedule) <= allowed_states(strategy, length)
        for joints in joint_sets(first, stop):
            schedule = list(plan_window(chosen, first, first, stop, joints).schedule)
            check_schedule(schedule, first, first, stop, joints)


def joint_sets(first: int, stop: int) -> Iterator[list[int]]:
    for k1 in (1, 2, 5):
        yield [t for t in range(first + 1, stop) if t % k1 == 0]


def kept_states(schedule: Sequence[Any]) -> int:
    """The most states that are kept at once."""
    most = now = 0
    for action in schedule:
        now += isinstance(action, Keep) - isinstance(action, Drop)
        most = max(most, now)
    return most


def allowed_states(strategy: str, length: int) -> int:
    """States a window may keep besides its first; one more where it starts after `first`."""
    name, _, number = strategy.partition(":")
    return int(number) - 1 + 1 if name == "revolve" else length


@pytest.mark.parametrize("num_states", range(1, 8))
def test_revolve_runs_the_fewest_steps_possible(num_states: int) -> None:
    """Against dynamic programming over every split."""
    for length in range(1, 41):
        steps = executed_steps(Revolve(num_states).actions(0, length, length))
        assert steps == fewest_steps(length, num_states)


@functools.cache
def fewest_steps(length: int, num_states: int) -> int:
    """Advances and differentiated steps, with one-step leaves and `num_states` states."""
    if length == 1:
        return 1
    if num_states == 1:  # from the first state every time
        return length * (length + 1) // 2
    return min(
        split + fewest_steps(length - split, num_states - 1) + fewest_steps(split, num_states)
        for split in range(1, length)
    )


def test_a_schedule_is_a_sequence_that_can_be_read_again() -> None:
    schedule = Schedule(lambda: Revolve(3).actions(0, 10, 10))
    actions = list(schedule)
    assert list(schedule) == actions
    assert len(schedule) == len(actions)
    assert [schedule[i] for i in range(-2, 3)] == [actions[i] for i in range(-2, 3)]
    assert schedule[2:7:2] == actions[2:7:2]
    assert schedule == actions
    assert schedule != actions[:-1]
    assert schedule != "something else"
    with pytest.raises(IndexError):
        schedule[len(actions)]
    assert f"len={len(actions)}" in repr(schedule)


# Schedules that users write.

VALID = [Advance(0, 4), Keep(4), Advance(4, 6), Differentiate(6, 8), Differentiate(4, 6), Drop(4)]
VALID += [Differentiate(0, 4)]


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_user_schedule_gives_the_same_gradient(executor: str) -> None:
    inputs, targets = random_data(8)
    module, init = tanh_cell(), random_state()
    run_window(module, mean_loss, inputs, targets, init, strategy="retain")
    expected = gradients(list(module.parameters()))
    for strategy in (VALID, tuple(VALID), Schedule(lambda: iter(VALID)), lambda *_: VALID):
        clear_gradients(list(module.parameters()))
        trace = ActionTrace()
        run_window(
            module,
            mean_loss,
            inputs,
            targets,
            init,
            strategy=strategy,
            executor=executor,
            observer=trace,
        )
        assert relative_error(gradients(list(module.parameters())), expected) <= 1e-12
        assert trace.actions == VALID


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("budget", [8, 9, 11, 14, 20, 26])
def test_planned_schedules_run_as_planned_and_give_the_same_gradient(
    budget: int, executor: str
) -> None:
    """A state takes three bytes and a leaf's step two: from one leaf down to several levels."""
    inputs, targets = random_data(13)
    module, init = tanh_cell(), random_state()
    run_window(module, mean_loss, inputs, targets, init, strategy="retain")
    expected = gradients(list(module.parameters()))
    planned = plan(13, Costs.linear(state_bytes=3, step_bytes=2), budget_bytes=budget)
    clear_gradients(list(module.parameters()))
    trace = ActionTrace()
    run = run_window(
        module,
        mean_loss,
        inputs,
        targets,
        init,
        strategy=planned.schedule,
        executor=executor,
        observer=trace,
    )
    assert relative_error(gradients(list(module.parameters())), expected) <= 1e-12
    assert trace.actions == list(planned.schedule)
    assert run.executed_steps == planned.executed_steps


INVALID: dict[str, list[Any]] = {
    "nothing": [],
    "the end is missing": [Differentiate(0, 4)],
    "the start is missing": [Advance(0, 4), Differentiate(4, 8)],
    "the middle is missing": [Advance(0, 6), Differentiate(6, 8), Differentiate(0, 4)],
    "a leaf overlaps the one before": [Advance(0, 4), Differentiate(4, 8), Differentiate(0, 5)],
    "a leaf is differentiated twice": [
        Advance(0, 4),
        Differentiate(4, 8),
        Differentiate(0, 4),
        Differentiate(0, 4),
    ],
    "first leaf first": [Differentiate(0, 4), Differentiate(4, 8)],
    "beyond the window": [Differentiate(0, 9)],
    "before the window": [Advance(-1, 4), Differentiate(4, 8), Differentiate(0, 4)],
    "an advance beyond the window": [Advance(0, 9), Differentiate(0, 8)],
    "an advance into what is differentiated": [
        Advance(0, 4),
        Differentiate(4, 8),
        Advance(0, 6),
        Differentiate(0, 4),
    ],
    "an empty leaf": [Advance(0, 4), Differentiate(4, 8), Differentiate(4, 4), Differentiate(0, 4)],
    "a backward advance": [Advance(0, 4), Advance(4, 2), Differentiate(0, 8)],
    "a leaf without a state": [Differentiate(4, 8), Differentiate(0, 4)],
    "an advance without a state": [Advance(2, 4), Differentiate(4, 8), Differentiate(0, 4)],
    "a state used after its drop": [
        Advance(0, 4),
        Keep(4),
        Drop(4),
        Advance(4, 6),
        Differentiate(6, 8),
        Differentiate(4, 6),
        Differentiate(0, 4),
    ],
    "a keep elsewhere": [Advance(0, 4), Keep(5), Differentiate(4, 8), Drop(5), Differentiate(0, 4)],
    "a keep with no working state": [Differentiate(0, 8), Keep(0), Drop(0)],
    "a keep twice": [Advance(0, 4), Keep(4), Keep(4), Differentiate(4, 8), Differentiate(0, 4)],
    "a drop of nothing": [Drop(4), Differentiate(0, 8)],
    "a drop twice": [
        Advance(0, 4),
        Keep(4),
        Differentiate(4, 8),
        Drop(4),
        Drop(4),
        Differentiate(0, 4),
    ],
    "a state never dropped": [Advance(0, 4), Keep(4), Differentiate(4, 8), Differentiate(0, 4)],
    "no action": [Differentiate(0, 8), "drop"],
    "a number": [Differentiate(0, 8), 3],
}


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_user_schedule_is_refused_before_anything_runs(name: str, executor: str) -> None:
    schedule = INVALID[name]
    inputs, targets = counting_data(8)

    def train(module: nn.Module, strategy: Any) -> None:
        tbptt = TBPTT(module, mean_loss, 8, 8, strategy=strategy, executor=executor)
        tbptt.train(TensorSequence(inputs, targets), torch.zeros(1, 2))

    for strategy in (schedule, lambda *_: schedule):
        module = counting_cell()
        with pytest.raises(ScheduleError):
            train(module, strategy)
        assert module.calls == 0
        assert all(p.grad is None for p in module.parameters())


def test_a_fixed_schedule_refuses_windows_of_another_length() -> None:
    inputs, targets = counting_data(12)
    tbptt = TBPTT(counting_cell(), mean_loss, 8, None, strategy=VALID)
    with pytest.raises(ScheduleError, match="12"):
        tbptt.train(TensorSequence(inputs, targets), torch.zeros(1, 2))


def test_check_schedule_accepts_states_that_are_given() -> None:
    actions = [Differentiate(4, 8), Differentiate(0, 4)]
    check_schedule(actions, 0, 0, 8, given=[4])
    with pytest.raises(ScheduleError):
        check_schedule(actions, 0, 0, 8)


class Diary(Observer):
    """Writes down what an executor tells its observer."""

    def __init__(self):
        self.entries = []

    def begins(self, action):
        self.entries.append(action)

    def differentiates(self):
        self.entries.append("differentiates")

    def ends(self):
        self.entries.append("ends")


@pytest.mark.parametrize("executor", ["replay", "checkpoint"])
@pytest.mark.parametrize("strategy", ["retain", "uniform:3", "revolve:2"])
@pytest.mark.parametrize("overlap", ["refresh", "stale"])
def test_an_observer_is_told_of_every_action_and_of_every_gradient(executor, strategy, overlap):
    torch.manual_seed(0)
    cell = nn.LSTMCell(2, 3)
    diary, options = Diary(), {"strategy": strategy, "executor": executor, "overlap": overlap}
    tbptt = TBPTT(cell, nn.functional.mse_loss, 4, 7, **options)
    sequence = TensorSequence(torch.randn(13, 1, 2), torch.randn(13, 1, 3))
    for _ in tbptt.windows(sequence):
        pass
    plain = [p.grad.clone() for p in cell.parameters()]
    cell.zero_grad()
    tbptt = TBPTT(cell, nn.functional.mse_loss, 4, 7, observer=diary, **options)
    for window in tbptt.windows(sequence):
        told = diary.entries
        actions = [entry for entry in told if not isinstance(entry, str)]
        assert actions == list(window.plan.schedule)
        assert told.pop() == "ends"
        leaves = [i for i, entry in enumerate(told) if isinstance(entry, Differentiate)]
        assert [i for i, entry in enumerate(told) if entry == "differentiates"] == [
            i + 1 for i in leaves
        ]
        told.clear()
    assert all(torch.equal(p.grad, g) for p, g in zip(cell.parameters(), plain, strict=True))


class Addresses(nn.Module):
    """A step that notes where the states lie that it makes and is given; all of them stay alive."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.RNNCell(2, 3)
        self.advanced: list[Tensor] = []
        self.given: list[Tensor] = []

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        new = self.cell(x, h)
        if torch.is_grad_enabled():
            self.given.append(h.detach())
        else:
            self.advanced.append(new)
        return new, new


@pytest.mark.parametrize("strategy", ["step", "uniform:3", "sqrt", "revolve:2"])
def test_kept_states_do_not_lie_in_what_an_advance_took(strategy: str) -> None:
    module = Addresses()
    trace = ActionTrace()
    tbptt = TBPTT(
        module, F.mse_loss, 14, None, strategy=strategy, time_batching=False, observer=trace
    )
    tbptt.train(TensorSequence(torch.randn(14, 1, 2), torch.randn(14, 1, 3)), torch.zeros(1, 3))
    keeps = {action.step for action in trace.actions if isinstance(action, Keep)}
    leaves = {action.start for action in trace.actions if isinstance(action, Differentiate)}
    assert keeps & leaves
    shared = {t.data_ptr() for t in module.advanced} & {t.data_ptr() for t in module.given}
    assert len(shared) == len(leaves - keeps - {0})  # these begin where an advance has just ended
