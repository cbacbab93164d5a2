"""Budgets of steps that run by compiled blocks: measured, planned and kept in that form."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import WIDTH, gradients, random_data, relative_error
from compiled_kinds import ADVANCE, KINDS, LEAF, check, names, normed

from tbptt_ckpt import TBPTT, Costs, InfeasibleBudgetError, Plan, TensorSequence, Trainer
from tbptt_ckpt.budget import forms as weighed
from tbptt_ckpt.budget import window_costs
from tbptt_ckpt.budget.checked_costs import ROUNDING_BYTES
from tbptt_ckpt.budget.measuring import measuring
from tbptt_ckpt.errors import ArgumentError, TbpttWarning
from tbptt_ckpt.executor import compilable, compiled_steps
from tbptt_ckpt.schedule.actions import Differentiate
from tbptt_ckpt.schedule.curves import scaled
from tbptt_ckpt.time_batching.compiler import Compiler

BLOCK = 2
STEPS, K = 48, 24


@pytest.fixture(autouse=True)
def _short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_steps, "BLOCK_STEPS", BLOCK)


def make(kind: str = "normed", k: int = K, backend: Any = "eager", **options: Any) -> TBPTT:
    module, _ = KINDS[kind]()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    return TBPTT(module, F.mse_loss, k, k, optimizer, compile=backend, **options)


def data(steps: int = STEPS) -> TensorSequence:
    return TensorSequence(*random_data(steps))


def leaves_of(plan: Plan) -> list[int]:
    return [a.stop - a.start for a in plan.schedule if isinstance(a, Differentiate)]


@functools.cache
def smallest() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TbpttWarning)  # no block could be compared in it
        with pytest.raises(InfeasibleBudgetError) as raised:
            make(memory_budget=1).train(data(), normed()[1])
    least = raised.value.smallest_budget_bytes
    assert least is not None
    return least


@pytest.mark.parametrize("share", [1.3, pytest.param(10.0, marks=pytest.mark.exhaustive)])
def test_budgets_hold_and_leaves_are_whole_blocks(share: float) -> None:
    budget = int(share * smallest())
    tbptt, (_, init) = make(memory_budget=budget, measure_memory=True), normed()
    for window in tbptt.windows(data(), init):
        plan = window.plan
        assert window.peak_bytes <= min(budget, plan.predicted_peak_bytes)
        assert plan.form == "compiled"
        assert plan.forms[0][0] == "compiled"
        assert plan.forms[0][1] > 0
        assert len(leaves_of(plan)) > 1 or share == 10.0
        assert all(steps % BLOCK == 0 for steps in leaves_of(plan))
    assert names(tbptt) >= ({LEAF, ADVANCE} if share < 10.0 else {LEAF})


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("kind", "loss", "weights", "overlap"),
    [
        ("normed", "pair", True, "refresh"),
        ("from None", "mean", False, "stale"),
        ("in parts", "mean", True, "refresh"),
    ],
)
def test_gradients_within_a_budget_are_those_of_a_plain_loop(
    kind: str, loss: str, weights: bool, overlap: str
) -> None:
    given = (1.0, 0.0, 2.0, 0.5, 0.0, 1.0, 3.0, 1.0, 1.0) if weights else None
    for k1, k2 in ((3, 7), (4, 8), (9, None)):
        for how in ({"memory_budget": "20KiB"}, {"memory_budget": "1MiB"}, {"strategy": "optimal"}):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", TbpttWarning)  # too little to compare a block
                check(kind, loss, given, overlap, k1=k1, k2=k2, compile="eager", **how)


@pytest.mark.exhaustive
def test_where_no_block_fits_steps_run_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    real = window_costs.calibrate

    def calibrate(probe: Any, *others: Any) -> Costs:
        costs = real(probe, *others)
        if probe.runner.time_batching.form != "compiled":
            return costs
        huge = costs.with_leaves(*[lambda curve: replace(curve, points=((1, 1e9), (2, 2e9)))] * 2)
        return replace(huge, quiet=None)

    monkeypatch.setattr(window_costs, "calibrate", calibrate)
    tbptt = make(memory_budget=10**6, measure_memory=True)
    windows, blocks = list[Any](), list[int]()
    for window in tbptt.windows(data(), normed()[1]):
        windows.append(window)
        blocks.append(sum(e.count for e in tbptt.batched_operations if e.operation == LEAF))
    assert all(window.peak_bytes <= 10**6 for window in windows)
    forms = dict(windows[-1].plan.forms)
    assert forms.pop("compiled") is None
    assert forms[windows[-1].plan.form] > 0
    assert len(set(blocks)) == 1  # of what was measured before the first window, and no more


@pytest.mark.exhaustive
def test_too_little_room_to_compare_a_block_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = 2 * smallest()
    monkeypatch.setattr(compilable, "bytes_to_hold", lambda *given: budget)
    tbptt = make(memory_budget=budget, measure_memory=True)
    with pytest.warns(TbpttWarning, match="holding a block against its steps may take"):
        windows = list(tbptt.windows(data(), normed()[1]))
    assert all(window.peak_bytes <= budget for window in windows)
    assert LEAF not in names(tbptt)


@pytest.fixture
def never_measured(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def refuse(*given: Any) -> Any:
        raise AssertionError("a resumed run measures nothing")

    return lambda: monkeypatch.setattr(window_costs, "calibrate", refuse)


def begun(backend: Any, state: Any = None, **options: Any) -> tuple[Trainer, Iterator[Any]]:
    trainer = Trainer(make(k=8, backend=backend, **options), data(), init_state=normed()[1])
    if state is not None:
        trainer.load_state_dict(state)
    return trainer, trainer.windows()


def told(windows: Iterator[Any]) -> list[tuple[float, str]]:
    return [(window.loss_value, window.plan.form) for window in windows]


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("eager", {"memory_budget": 10**6}),
        pytest.param("aot_eager", {"memory_budget": 10**6}, marks=pytest.mark.exhaustive),
        pytest.param("aot_eager", {"strategy": "uniform:4"}, marks=pytest.mark.exhaustive),
    ],
)
def test_a_resumed_run_ends_bit_by_bit_where_one_that_never_stopped_ends(
    backend: str, options: dict[str, Any], never_measured: Callable[[], None]
) -> None:
    unbroken, windows = begun(backend, **options)
    assert {form for _, form in told(itertools.islice(windows, 3))} == {"compiled"}
    state = copy.deepcopy(unbroken.state_dict())
    later = told(windows)
    never_measured()
    resumed, windows = begun(backend, state, **options)
    assert told(windows) == later
    assert len(later) == STEPS // 8 - 3
    for one, other in zip(weights_of(unbroken), weights_of(resumed), strict=True):
        assert torch.equal(one, other)


def weights_of(trainer: Trainer) -> list[torch.Tensor]:
    return list(trainer.tbptt.parts.parameters)


@pytest.mark.exhaustive
def test_a_run_that_is_resumed_without_compiling_is_measured_anew() -> None:
    saved, windows = begun("eager", memory_budget=10**6)
    told(itertools.islice(windows, 3))
    resumed, windows = begun(False, copy.deepcopy(saved.state_dict()), memory_budget=10**6)
    assert {form for _, form in told(windows)} == {"auto"}
    assert LEAF not in names(resumed.tbptt)


@pytest.mark.exhaustive
def test_a_plan_that_is_followed_fixes_the_form() -> None:
    (_, init), budget = normed(), int(2 * smallest())
    first, *_ = make(memory_budget=budget).windows(data(), init)
    plan = Plan.from_dict(json.loads(json.dumps(first.plan.to_dict())))
    for backend in ("eager", "auto"):
        tbptt = make(strategy=plan, backend=backend)
        if backend == "auto":  # as if it were Inductor's
            tbptt.parts.runner.compiled._compiler.backend = "eager"
        followed = [window.plan for window in tbptt.windows(data(), init)]
        assert {each.form for each in followed} == {"compiled"}
        assert leaves_of(followed[0]) == leaves_of(plan)
        assert LEAF in names(tbptt)
    with pytest.raises(ArgumentError, match="is a plan of compiled steps, and compile=False"):
        make(strategy=plan, backend=False)
    plain, *_ = make(backend=False, memory_budget=budget).windows(data(), init)
    tbptt = make(strategy=plain.plan, backend="auto")
    tbptt.train(data(), init)
    assert LEAF not in names(tbptt)


@pytest.mark.exhaustive
def test_given_costs_are_planned_in_blocks() -> None:
    costs = Costs.linear(state_bytes=96, step_bytes=700)
    tbptt = make(memory_budget=smallest() * 2, costs=costs, measure_memory=True)
    windows = list(tbptt.windows(data(), normed()[1]))
    assert {window.plan.form for window in windows} == {"compiled"}
    assert all(steps % BLOCK == 0 for w in windows for steps in leaves_of(w.plan))


@pytest.mark.exhaustive
def test_compiling_counts_in_no_window_and_is_done_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level("INFO", "tbptt_ckpt"):
        found = list(make(memory_budget=10**6).windows(data(), normed()[1]))
    assert [window.compile_seconds > 0 for window in found] == [True] + [False] * (len(found) - 1)
    assert [message.split()[0] for message in caplog.messages].count("compiled") == 2


@pytest.mark.exhaustive
def test_gradients_agree_with_those_of_no_budget() -> None:
    found = []
    for options in ({"memory_budget": int(2 * smallest())}, {"backend": False}):
        tbptt = make(**options)
        tbptt.train(data(), normed()[1])
        found.append(gradients(list(tbptt.parts.parameters)))
    assert relative_error(found[0], found[1]) < 1e-10


@pytest.mark.exhaustive
@pytest.mark.parametrize(("factor", "form"), [(0.5, "compiled"), (2.0, "auto")])
def test_auto_weighs_compiled_steps_like_other_forms(
    factor: float, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = window_costs.calibrate

    def calibrate(probe: Any, *others: Any) -> Costs:
        is_compiled = probe.runner.time_batching.form == "compiled"
        each = factor if is_compiled else 1.0
        costs, linear = real(probe, *others), Costs.linear(state_bytes=1, step_bytes=1)
        seconds = scaled(linear.leaf_seconds, each), scaled(linear.advance_seconds, each)
        return replace(costs, leaf_seconds=seconds[0], advance_seconds=seconds[1])

    monkeypatch.setattr(window_costs, "calibrate", calibrate)
    monkeypatch.setattr(weighed, "_LEAST_SHARE", float("-inf"))  # however slow a machine
    monkeypatch.setattr(compiled_steps, "_EARNED_STEPS", 1)
    monkeypatch.setattr(compiled_steps, "Compiler", lambda choice: Compiler("eager"))
    tbptt = make(backend="auto", memory_budget=int(1.5 * smallest()), measure_memory=True)
    for window in tbptt.windows(data(), normed()[1]):
        assert window.plan.form == form
        assert {name for name, _ in window.plan.forms} >= {"compiled", "auto"}
        assert window.peak_bytes <= int(1.5 * smallest())


@pytest.mark.exhaustive
def test_shapes_that_are_compiled_no_more_are_measured_anew() -> None:
    module, _ = normed()
    tbptt = TBPTT(module, F.mse_loss, K, K, memory_budget=10**6, compile="eager")
    forms = []
    for lanes in (9, 8, 7, 6, 5, 10):  # one compiled shape more than there may be
        state = tuple(torch.zeros(lanes, WIDTH, dtype=torch.float64) for _ in range(2))
        sequence = TensorSequence(*random_data(K, lanes=lanes))
        forms += [window.plan.form for window in tbptt.windows(sequence, state)]
    assert forms == [*["compiled"] * 4, "auto", "auto"]


@pytest.mark.exhaustive
def test_windows_that_become_long_enough_for_a_block_are_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compiled_steps, "BLOCK_STEPS", 8)
    module, init = normed()
    tbptt = TBPTT(module, F.mse_loss, 6, 12, memory_budget=10**6, compile="eager")
    forms = [window.plan.form for window in tbptt.windows(data(), init)]
    assert forms == ["auto", *["compiled"] * (STEPS // 6 - 1)]


@pytest.mark.exhaustive
def test_leaves_of_every_length_take_no_more_than_costs_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, found = window_costs.calibrate, list[tuple[int, float, float]]()

    def calibrate(probe: Any, *others: Any) -> Costs:
        costs = real(probe, *others)
        with measuring(probe) as (own, _):
            for steps in range(1, K):
                taken = own.bytes_of(steps)
                last = taken.last_leaf_beside_gradients.most
                found.append((steps, taken.leaf.most, costs.leaf_bytes(steps)))
                found.append((steps, last, costs.leaf_curve(is_last=True)(steps)))
                found.append((steps, taken.advance, costs.advance_bytes(steps)))
        return costs

    monkeypatch.setattr(compiled_steps, "BLOCK_STEPS", 4)
    monkeypatch.setattr(window_costs, "calibrate", calibrate)
    tbptt = make(memory_budget=10**7)
    tbptt.train(data(K), normed()[1])
    assert LEAF in names(tbptt)
    assert len(found) == 3 * (K - 1)
    for steps, taken, said in found:
        assert taken <= said + ROUNDING_BYTES, steps
