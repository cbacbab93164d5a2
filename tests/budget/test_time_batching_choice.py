"""Under a measured plan "auto" weighs both forms, batched over time and plain, and runs one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from tbptt_ckpt import TBPTT, Costs, InfeasibleBudgetError, TensorSequence, Trainer
from tbptt_ckpt.budget import window_costs as costed
from tbptt_ckpt.schedule.curves import scaled
from tbptt_ckpt.time_batching.policy import SLOWER

WIDTH, LANES, K, STEPS = 256, 2, 10, 30  # wide enough for the rule of "auto"
Inject = Callable[..., list[tuple[object, float]]]


class Loop(nn.Module):
    """A cell that is one's own: without parts, and batched over time where it is large."""

    def __init__(self, width: int, _: int) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(width, width)

    def forward(self, x: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        h, c = self.cell(x, state)
        return h, (h, c)


KINDS = [Loop, nn.LSTMCell]


@pytest.fixture
def inject(monkeypatch: pytest.MonkeyPatch) -> Inject:
    """Costs of both forms: those that are measured, times given factors.

    Returns the forms that were measured, each with the seconds that it was allowed.
    """
    real = costed.calibrate

    def install(plain_seconds: float, batched_bytes: float = 1.0) -> list[tuple[object, float]]:
        seen: list[tuple[object, float]] = []

        def calibrate(probe: Any, limits: Any, *others: Any) -> Costs:
            choice = probe.runner.time_batching.choice
            seen.append((choice, limits.max_seconds))
            costs = real(probe, replace(limits, max_steps=3, max_seconds=0.0), *others)
            seconds = 1.0 if choice == "auto" else plain_seconds
            grown = batched_bytes if choice == "auto" else 1.0
            linear = Costs.linear(state_bytes=1, step_bytes=1, step_seconds=seconds)
            return replace(
                costs,
                leaf_bytes=scaled(costs.leaf_bytes, grown),
                last_leaf_bytes=costs.last_leaf_bytes and scaled(costs.last_leaf_bytes, grown),
                leaf_seconds=linear.leaf_seconds,
                advance_seconds=linear.advance_seconds,
            )

        monkeypatch.setattr(costed, "calibrate", calibrate)
        monkeypatch.setattr(costed, "_LEAST_SHARE", float("-inf"))  # however slow a machine
        return seen

    return install


def make(
    width: int = WIDTH, kind: Callable[..., nn.Module] = Loop, **options: Any
) -> tuple[TBPTT, TensorSequence]:
    torch.manual_seed(0)
    cell = kind(width, width).double()
    sequence = TensorSequence(
        torch.randn(STEPS, LANES, width).double(), torch.randn(STEPS, LANES, width).double()
    )
    options = {"memory_budget": 10**9, **options}
    optimizer = torch.optim.SGD(cell.parameters(), lr=0.1)
    return TBPTT(cell, nn.functional.mse_loss, K, K, optimizer, **options), sequence


def is_plain(tbptt: TBPTT) -> bool:
    return any(operation.reason == SLOWER for operation in tbptt.batched_operations)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("plain_seconds", [0.5, 2.0])
def test_the_form_with_fewer_predicted_seconds_runs_and_gradients_agree(
    inject: Inject, plain_seconds: float, kind: Any, caplog: pytest.LogCaptureFixture
) -> None:
    inject(plain_seconds)
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
    assert is_plain(ours) == (plain_seconds < 1)
    assert ("steps are left plain" in caplog.text) == (plain_seconds < 1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_faster_form_is_left_where_it_does_not_fit(inject: Inject, kind: Any) -> None:
    inject(2.0, batched_bytes=1e3)
    tbptt, sequence = make(kind=kind, memory_budget=1)
    with pytest.raises(InfeasibleBudgetError) as raised:
        tbptt.train(sequence)
    budget = int(1.3 * raised.value.smallest_budget_bytes)
    tbptt, sequence = make(kind=kind, memory_budget=budget, measure_memory=True)
    assert all(window.peak_bytes <= budget for window in tbptt.windows(sequence))
    assert is_plain(tbptt)


def test_the_smallest_budget_is_that_of_the_form_which_needs_less(inject: Inject) -> None:
    def smallest(**options: Any) -> int:
        tbptt, sequence = make(memory_budget=1, **options)
        with pytest.raises(InfeasibleBudgetError) as raised:
            tbptt.train(sequence)
        assert raised.value.smallest_budget_bytes is not None
        return raised.value.smallest_budget_bytes

    inject(1.0)
    either, plain = smallest(), smallest(time_batching=False)
    inject(1.0, batched_bytes=1e3)
    assert smallest() == plain >= either


def test_both_forms_share_the_time_of_a_calibration(inject: Inject) -> None:
    seen = inject(2.0)
    tbptt, sequence = make()
    next(tbptt.windows(sequence))
    assert [choice for choice, _ in seen] == ["auto", False]
    assert sum(seconds for _, seconds in seen) <= 1.6


@pytest.mark.parametrize(
    "options",
    [
        {"width": 8},
        {"time_batching": True},
        {"time_batching": False},
        {"strategy": "uniform:4"},
    ],
)
def test_nothing_is_weighed_where_nothing_is_open(inject: Inject, options: dict[str, Any]) -> None:
    seen = inject(0.01)
    tbptt, sequence = make(**options)
    tbptt.train(sequence)
    assert [seconds for _, seconds in seen] == [1.6]
    assert not is_plain(tbptt)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("plain_seconds", [0.5, 2.0])
def test_a_resumed_run_has_the_same_form_bitwise(
    inject: Inject, plain_seconds: float, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inject(plain_seconds)
    trainer = Trainer(*make(kind=kind))
    windows = trainer.windows()
    next(windows)
    state = trainer.state_dict()
    resumed = Trainer(*make(kind=kind))
    monkeypatch.delattr(costed, "calibrate")  # nothing is measured again
    resumed.load_state_dict(state)
    next(resumed.windows())
    next(windows)
    assert is_plain(resumed.tbptt) == is_plain(trainer.tbptt) == (plain_seconds < 1)
    ours, theirs = (each.tbptt.parts.parameters for each in (resumed, trainer))
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_what_earlier_versions_saved_follows_the_rule(inject: Inject) -> None:
    inject(0.5)
    tbptt, sequence = make()
    next(tbptt.windows(sequence))
    state = tbptt.parts.budget.state_dict()
    assert state.pop("time_batching") is False
    again, _ = make()
    again.parts.budget.load_state_dict(state)
    next(again.windows(sequence))
    assert not is_plain(again)
