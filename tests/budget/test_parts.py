"""Budgets of steps that are run by their parts: a cut makes two calls of what is one otherwise."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from grids import covering
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, InfeasibleBudgetError, Recurrent, TensorSequence
from tbptt_ckpt.executor import found_parts

LANES, WIDTH, CLASSES = 8, 48, 24


def in_parts(transition: nn.Module) -> nn.Module:
    return Recurrent(transition, nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES))


class OneForward(nn.Module):
    """A step that does not say its parts."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell
        self.encode, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        if state is None:
            state = x.new_zeros(len(x), WIDTH)
        state = self.cell(torch.tanh(self.encode(x)), state)
        return self.out(state), state


class OneForwardOfTwo(OneForward):
    """The same, whose cell has two states."""

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        h, c = self.cell(torch.tanh(self.encode(x)), state)
        return self.out(h), (h, c)


KINDS = {
    "found kernel": lambda: OneForwardOfTwo(nn.LSTMCell(WIDTH, WIDTH)),
    "found": lambda: OneForward(nn.GRUCell(WIDTH, WIDTH)),
    "kernel": lambda: in_parts(nn.LSTMCell(WIDTH, WIDTH)),
    "loop": lambda: in_parts(nn.GRUCell(WIDTH, WIDTH)),
    "cell": lambda: nn.LSTMCell(WIDTH, WIDTH),
}


def summed(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss that is called step by step."""
    return (outputs.logsumexp(1) - outputs.gather(1, targets[:, None])[:, 0]).mean()


LOSSES = {"of torch's": nn.functional.cross_entropy, "own": summed}


@pytest.fixture(autouse=True)
def _short_windows_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(found_parts, "_LEAST_STEPS", 1)


def data(num_steps: int, *, resets: bool, weights: bool, dtype: torch.dtype) -> TensorSequence:
    torch.manual_seed(1)
    inputs, targets = (
        torch.randn(num_steps, LANES, WIDTH),
        torch.randint(0, CLASSES, (num_steps, LANES)),
    )
    begins = (torch.arange(num_steps)[:, None] + torch.arange(LANES)) % 23 == 0
    counts = (torch.arange(num_steps)[:, None] + torch.arange(LANES)) % 5 > 0
    return TensorSequence(
        inputs.to(dtype),
        targets,
        resets=begins if resets else None,
        weight=counts.double() if weights else None,
    )


def make(
    kind: str, loss: str, dtype: torch.dtype, k1: int, k2: int | None, **options: Any
) -> TBPTT:
    torch.manual_seed(0)
    module = KINDS[kind]().to(dtype)
    optimizer = torch.optim.Adam(module.parameters())
    return TBPTT(module, LOSSES[loss], k1, k2, optimizer, **options)


def least(*what: Any, sequence: TensorSequence, **options: Any) -> int:
    with pytest.raises(InfeasibleBudgetError) as raised:
        make(*what, memory_budget=1, **options).train(sequence)
    assert raised.value.smallest_budget_bytes is not None
    return raised.value.smallest_budget_bytes


# With the two that differ most by default.
OF_EVERY_KIND = pytest.mark.parametrize(
    ("kind", "strategy"),
    [
        pytest.param(kind, strategy, marks=() if is_default else pytest.mark.exhaustive)
        for kind, strategy in product(KINDS, ["optimal", "uniform:6"])
        for is_default in [kind in ("found kernel", "loop") and strategy == "optimal"]
    ],
)


@covering(
    together=1,
    kind=list(KINDS),
    loss=list(LOSSES),
    reach=[(20, 20), (10, 25), (25, 10), (20, None)],
    overlap=["refresh", "stale"],
    strategy=["optimal", "uniform:6"],
    resets=[False, True],
    weights=[False, True],
    factor=[1.0, 1.4],
)
def test_budgets_are_kept_and_gradients_are_those_of_a_loop(
    kind, loss, reach, overlap, strategy, resets, weights, factor
):
    sequence = data(60, resets=resets, weights=weights, dtype=torch.float64)
    what = kind, loss, torch.float64, *reach
    options = {"overlap": overlap, "strategy": strategy}
    budget = int(factor * least(*what, sequence=sequence, **options))
    ours = make(*what, memory_budget=budget, measure_memory=True, **options)
    plain = make(*what, time_batching=False, overlap=overlap, strategy="retain")
    for mine, its in zip(ours.windows(sequence), plain.windows(sequence), strict=True):
        assert mine.peak_bytes is not None
        assert mine.peak_bytes <= budget
        torch.testing.assert_close(mine.loss, its.loss, rtol=1e-10, atol=0)
        for one, other in zip(ours.parts.parameters, plain.parts.parameters, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


@OF_EVERY_KIND
def test_a_module_that_changes_is_held_anew_within_its_budget(kind: str, strategy: str) -> None:
    """What comparing it with its parts takes is no step's, and later windows are not refused."""
    sequence = data(100, resets=True, weights=False, dtype=torch.float64)
    what = kind, "own", torch.float64, 20, 20
    budget = least(*what, sequence=sequence, strategy=strategy)
    tbptt = make(*what, memory_budget=budget, measure_memory=True, strategy=strategy)
    for window in tbptt.windows(sequence):
        tbptt.parts.recurrence.module.train(window.index % 2 > 0)
        assert window.peak_bytes is not None
        assert window.peak_bytes <= budget


@OF_EVERY_KIND
def test_a_module_that_is_watched_from_some_window_on_keeps_to_its_budget(
    kind: str, strategy: str
) -> None:
    """A hook wants to see every step, and a loop takes other bytes: they are measured anew."""
    sequence = data(100, resets=False, weights=False, dtype=torch.float64)
    what = kind, "of torch's", torch.float64, 20, 20
    budgets = [
        least(*what, sequence=sequence, strategy=strategy, time_batching=form)
        for form in ("auto", False)
    ]
    budget = int(1.1 * max(budgets))
    tbptt = make(*what, memory_budget=budget, measure_memory=True, strategy=strategy)
    plain = make(*what, time_batching=False)
    for mine, its in zip(tbptt.windows(sequence), plain.windows(sequence), strict=True):
        if mine.index == 1:
            module = tbptt.parts.recurrence.module
            next(module.children(), module).register_forward_hook(lambda *_: None)
        assert mine.peak_bytes is not None
        assert mine.peak_bytes <= budget
        torch.testing.assert_close(mine.loss, its.loss, rtol=1e-10, atol=0)
    made = [each.operation for each in tbptt.batched_operations if not each.reason]
    assert any(name.endswith("of all steps") for name in made)


@pytest.mark.parametrize("kind", KINDS)
def test_peaks_are_predicted(kind: str) -> None:
    sequence = data(80, resets=False, weights=False, dtype=torch.float32)
    what = kind, "of torch's", torch.float32, 40, 40
    smallest = least(*what, sequence=sequence, time_batching=True)
    for factor in (1.0, 1.3):
        budget = int(factor * smallest)
        tbptt = make(*what, memory_budget=budget, time_batching=True, measure_memory=True)
        for window in tbptt.windows(sequence):
            assert window.plan is not None
            assert window.peak_bytes is not None
            off = window.plan.predicted_peak_bytes - window.peak_bytes
            assert -64 * 1024 <= off <= max(0.03 * window.peak_bytes, 64 * 1024)
            assert window.peak_bytes <= budget
        assert any(not operation.reason for operation in tbptt.batched_operations)
