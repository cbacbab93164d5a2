"""Under a measured plan "auto" weighs the forms that are open, and runs one."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tbptt_ckpt import (
    TBPTT,
    Costs,
    InfeasibleBudgetError,
    Plan,
    ScheduleError,
    TensorSequence,
    Trainer,
)
from tbptt_ckpt.budget import forms as weighed
from tbptt_ckpt.budget import window_costs as costed
from tbptt_ckpt.schedule.curves import scaled
from tbptt_ckpt.time_batching.policy import SLOWER

WIDTH, LANES, K, STEPS = 256, 2, 10, 30  # wide enough for the rule of "auto"
Inject = Callable[..., list[tuple[str, float]]]


class Loop(nn.Module):
    """A cell that is one's own: without parts, and batched over time where it is large."""

    def __init__(self, width: int, _: int) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(width, width)

    def forward(self, x: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        h, c = self.cell(x, state)
        return h, (h, c)


class Middling(nn.Module):
    """Layers of which none is large enough for the rule, but all of them to be weighed."""

    def __init__(self, width: int, _: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(4))

    def forward(self, x: torch.Tensor, state: torch.Tensor | None) -> tuple[Any, Any]:
        h = x if state is None else x + state
        for layer in self.layers:
            h = torch.tanh(self.through(layer, h))
        return h, h

    def through(self, layer: nn.Module, h: torch.Tensor) -> torch.Tensor:
        return layer(h)


class Unbatched(Middling):
    """The same with weights that are computed in the step."""

    def through(self, layer: nn.Module, h: torch.Tensor) -> torch.Tensor:
        return h @ torch.tanh(layer.weight)


KINDS = [Loop, nn.LSTMCell]


FORMS = {
    Loop: ["auto", "plain"],
    nn.LSTMCell: ["mixed", "fused", "batched", "plain"],
    Middling: ["plain", "batched"],
}


@pytest.fixture
def inject(monkeypatch: pytest.MonkeyPatch) -> Inject:
    """Costs of each form: those that are measured, times given factors, one by default.

    Returns the forms that were measured, each with the seconds that it was allowed.
    """
    real = costed.calibrate

    def install(
        seconds: dict[str, float], bytes_of: dict[str, float] | None = None
    ) -> list[tuple[str, float]]:
        seen: list[tuple[str, float]] = []

        def calibrate(probe: Any, limits: Any, *others: Any) -> Costs:
            form = probe.runner.time_batching.form
            seen.append((form, limits.max_seconds))
            costs = real(probe, replace(limits, max_steps=3, max_seconds=0.0), *others)
            grown = (bytes_of or {}).get(form, 1.0)
            each = seconds.get(form, 1.0)
            linear = Costs.linear(state_bytes=1, step_bytes=1, step_seconds=each)
            return replace(
                costs,
                leaf_bytes=scaled(costs.leaf_bytes, grown),
                last_leaf_bytes=costs.last_leaf_bytes and scaled(costs.last_leaf_bytes, grown),
                leaf_seconds=linear.leaf_seconds,
                advance_seconds=linear.advance_seconds,
            )

        monkeypatch.setattr(costed, "calibrate", calibrate)
        monkeypatch.setattr(weighed, "_LEAST_SHARE", float("-inf"))  # however slow a machine
        return seen

    return install


def make(
    width: int = WIDTH, kind: Callable[..., nn.Module] = Loop, k: int = K, **options: Any
) -> tuple[TBPTT, TensorSequence]:
    torch.manual_seed(0)
    cell = kind(width, width).double()
    shape = max(STEPS, k), LANES, width
    sequence = TensorSequence(torch.randn(shape).double(), torch.randn(shape).double())
    options = {"memory_budget": 10**9, **options}
    optimizer = torch.optim.SGD(cell.parameters(), lr=0.1)
    return TBPTT(cell, nn.functional.mse_loss, k, k, optimizer, **options), sequence


def is_plain(tbptt: TBPTT) -> bool:
    return any(operation.reason == SLOWER for operation in tbptt.batched_operations)


def form_of(tbptt: TBPTT) -> str:
    return tbptt.parts.runner.time_batching.form


DEFAULT = {Loop: "auto", nn.LSTMCell: "batched", Middling: "batched"}
CASES = [
    pytest.param(kind, form, marks=() if form == DEFAULT[kind] else pytest.mark.exhaustive)
    for kind in FORMS
    for form in FORMS[kind]
]


@pytest.mark.parametrize(("kind", "fastest"), CASES)
def test_the_form_with_fewest_predicted_seconds_runs_and_gradients_agree(
    inject: Inject, fastest: str, kind: Any, caplog: pytest.LogCaptureFixture
) -> None:
    seen = inject({fastest: 0.5})
    (ours, sequence), (plain, _) = (
        make(kind=kind),
        make(kind=kind, time_batching=False, strategy="retain"),
    )
    with caplog.at_level(logging.INFO, logger="tbptt_ckpt"):
        for found, expected in zip(ours.windows(sequence), plain.windows(sequence), strict=True):
            torch.testing.assert_close(found.loss, expected.loss, rtol=1e-12, atol=0)
            for one, other in zip(ours.parts.parameters, plain.parts.parameters, strict=True):
                difference = (one.grad - other.grad).norm() / other.grad.norm()
                assert difference <= 1e-12
            assert found.plan.form == fastest
            assert dict(found.plan.forms) == {
                form: 3 * K * (0.5 if form == fastest else 1.0) for form in FORMS[kind]
            }
            assert Plan.from_dict(json.loads(json.dumps(found.plan.to_dict()))) == found.plan
            assert f"steps {fastest} (predicted: " in str(found.plan)
    assert [form for form, _ in seen][: len(FORMS[kind])] == FORMS[kind]
    assert is_plain(ours) == (fastest == "plain")
    assert f"steps {fastest} (predicted: " in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_a_faster_form_is_left_where_it_does_not_fit(inject: Inject, kind: Any) -> None:
    others = [form for form in FORMS[kind] if form != "plain"]
    inject({"plain": 2.0}, dict.fromkeys(others, 1e3))
    tbptt, sequence = make(kind=kind, memory_budget=1)
    with pytest.raises(InfeasibleBudgetError) as raised:
        tbptt.train(sequence)
    budget = int(1.3 * raised.value.smallest_budget_bytes)
    tbptt, sequence = make(kind=kind, memory_budget=budget, measure_memory=True)
    windows = list(tbptt.windows(sequence))
    assert all(window.peak_bytes <= budget for window in windows)
    weighed_forms = dict(windows[0].plan.forms)
    assert weighed_forms.pop("plain") > 0
    assert weighed_forms == dict.fromkeys(others)  # which fit nowhere
    assert is_plain(tbptt)


def test_the_smallest_budget_is_that_of_the_form_which_needs_least(inject: Inject) -> None:
    def smallest(**options: Any) -> int:
        tbptt, sequence = make(memory_budget=1, **options)
        with pytest.raises(InfeasibleBudgetError) as raised:
            tbptt.train(sequence)
        assert raised.value.smallest_budget_bytes is not None
        return raised.value.smallest_budget_bytes

    inject({})
    either, plain = smallest(), smallest(time_batching=False)
    inject({}, {"auto": 1e3})
    assert smallest() == plain >= either


def test_where_time_runs_out_others_are_measured_if_nothing_fits(
    inject: Inject, monkeypatch: pytest.MonkeyPatch
) -> None:
    forms = {}
    for bytes_of in ({}, {"mixed": 1e6}):
        seen = inject({}, bytes_of)
        monkeypatch.setattr(weighed, "_LEAST_SHARE", float("inf"))
        tbptt, sequence = make(kind=nn.LSTMCell, memory_budget=10**9)
        next(tbptt.windows(sequence))
        forms[len(bytes_of)] = [form for form, _ in seen]
    assert forms == {0: ["mixed"], 1: ["mixed", "fused"]}


def test_where_time_runs_out_others_are_measured_if_there_is_hardly_room(
    inject: Inject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A form that fits with leaves of a step or two is not taken for want of time."""
    inject({}, {"mixed": 30.0})
    tbptt, sequence = make(kind=nn.LSTMCell, k=400, time_batching="mixed", memory_budget=1)
    with pytest.raises(InfeasibleBudgetError) as refused:
        tbptt.train(sequence)
    assert refused.value.smallest_budget_bytes is not None
    seen = inject({}, {"mixed": 30.0})
    monkeypatch.setattr(weighed, "_LEAST_SHARE", float("inf"))
    budget = refused.value.smallest_budget_bytes
    tbptt, sequence = make(kind=nn.LSTMCell, k=400, memory_budget=budget)
    window = next(tbptt.windows(sequence))
    assert [form for form, _ in seen][:2] == ["mixed", "fused"]
    assert window.plan.form != "mixed"


@pytest.mark.exhaustive
def test_longer_windows_than_those_before_are_weighed_anew(inject: Inject) -> None:
    """The fastest form for short windows, with room to spare, may not fit long ones."""
    inject({"mixed": 0.5}, {"mixed": 1.4})

    def trained(steps: int, **options: Any) -> TBPTT:
        tbptt, sequence = make(kind=nn.LSTMCell, **{"k": 400, **options})
        tbptt.train(TensorSequence(sequence.inputs[:steps], sequence.targets[:steps]))
        return tbptt

    def smallest(steps: int, form: str) -> int:
        with pytest.raises(InfeasibleBudgetError) as raised:
            trained(steps, memory_budget=1, time_batching=form)
        assert raised.value.smallest_budget_bytes is not None
        return raised.value.smallest_budget_bytes

    budget = smallest(400, "mixed") - 1
    assert max(smallest(20, "mixed"), smallest(400, "auto")) <= budget
    tbptt = trained(20, memory_budget=budget)
    assert form_of(tbptt) == "mixed"
    _, sequence = make(kind=nn.LSTMCell, k=400)
    tbptt.train(sequence)
    assert form_of(tbptt) != "mixed"


@pytest.mark.parametrize("kind", KINDS)
def test_forms_share_the_time_of_a_calibration(
    inject: Inject, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes all that it may; what one leaves, as one that does not fit, is the others'."""
    seen = inject({})
    taken = SimpleNamespace(perf_counter=lambda: sum(seconds for _, seconds in seen))
    monkeypatch.setattr(weighed, "time", taken)
    tbptt, sequence = make(kind=kind)
    next(tbptt.windows(sequence))
    assert sum(seconds for _, seconds in seen) <= 1.6 + 1e-9


def test_a_step_of_large_and_small_weights_has_a_form_that_batches_all(inject: Inject) -> None:
    class WithReadout(Loop):
        def __init__(self, width: int, _: int) -> None:
            super().__init__(width, width)
            self.readout = nn.Linear(width, width)

        def forward(self, x: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
            h, state = super().forward(x, state)
            return self.readout(h), state

    seen = inject({"batched": 0.5})
    tbptt, sequence = make(kind=WithReadout)
    next(tbptt.windows(sequence))
    assert [form for form, _ in seen] == ["auto", "batched", "plain"]
    assert form_of(tbptt) == "batched"
    small = {each.shape for each in tbptt.batched_operations if not each.reason}
    assert (WIDTH, WIDTH) in small


def test_what_a_first_step_shows_may_leave_one_form(
    inject: Inject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is measured in all of the time; before, it ended in a division by zero."""
    seen = inject({})
    tbptt, sequence = make()
    shown = iter([["auto", "plain"]])
    monkeypatch.setattr(type(tbptt.parts.runner), "forms", lambda _: next(shown, ["auto"]))
    tbptt.train(sequence)
    assert seen == [("auto", 1.6)]
    assert form_of(tbptt) == "auto"


def test_steps_of_which_nothing_is_batched_stay_plain(inject: Inject) -> None:
    seen = inject({"batched": 0.5})
    tbptt, sequence = make(kind=Unbatched)
    window = next(tbptt.windows(sequence))
    assert [form for form, _ in seen] == ["plain", "batched"]
    assert window.plan.form == form_of(tbptt) == "plain"
    assert dict(window.plan.forms) == {"plain": 3 * K}


@pytest.mark.parametrize(
    "options",
    [
        {"width": 8},
        {"kind": Middling, "width": 128},
        {"time_batching": True},
        {"time_batching": False},
        {"time_batching": "fused"},
        {"time_batching": "mixed"},
        {"strategy": "uniform:4"},
    ],
)
def test_nothing_is_weighed_where_nothing_is_open(inject: Inject, options: dict[str, Any]) -> None:
    seen = inject({"plain": 0.01})
    tbptt, sequence = make(**options)
    tbptt.train(sequence)
    assert [seconds for _, seconds in seen] == [1.6]
    assert not is_plain(tbptt)


@pytest.mark.parametrize(("kind", "fastest"), CASES)
def test_a_resumed_run_has_the_same_form_bitwise(
    inject: Inject, fastest: str, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inject({fastest: 0.5})
    trainer = Trainer(*make(kind=kind))
    windows = trainer.windows()
    next(windows)
    state = trainer.state_dict()
    resumed = Trainer(*make(kind=kind))
    monkeypatch.delattr(costed, "calibrate")  # nothing is measured again
    resumed.load_state_dict(state)
    plan = next(resumed.windows()).plan
    assert plan == next(windows).plan
    assert plan.form == form_of(resumed.tbptt) == fastest
    ours, theirs = (each.tbptt.parts.parameters for each in (resumed, trainer))
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("kind", "fastest"), CASES)
def test_a_plan_given_as_strategy_fixes_schedule_and_form(
    inject: Inject, fastest: str, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inject({fastest: 0.5})
    tbptt, sequence = make(kind=kind)
    results = list(tbptt.windows(sequence))
    monkeypatch.delattr(costed, "calibrate")  # nothing is measured
    again, _ = make(kind=kind, memory_budget=None, strategy=results[0].plan)
    for mine, its in zip(again.windows(sequence), results, strict=True):
        assert mine.plan.form == its.plan.form
        assert mine.plan.schedule == its.plan.schedule
        torch.testing.assert_close(mine.loss, its.loss, rtol=1e-12, atol=0)
    shorter = TensorSequence(*(each[:5] for each in (sequence.inputs, sequence.targets)))
    with pytest.raises(ScheduleError, match="is of 10 steps"):
        again.train(shorter)


def test_what_earlier_versions_saved_follows_the_rule(inject: Inject) -> None:
    inject({"plain": 0.5})
    tbptt, sequence = make()
    next(tbptt.windows(sequence))
    for rule, form in ((True, "auto"), (False, "plain"), (None, "auto")):
        state = tbptt.parts.budget.state_dict()
        assert state.pop("form") == "plain"
        del state["forms"]
        again, _ = make()
        again.parts.budget.load_state_dict(
            state if rule is None else {**state, "time_batching": rule}
        )
        next(again.windows(sequence))
        assert form_of(again) == form
