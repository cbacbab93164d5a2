"""Budgets of what an accelerator's allocator reserves; one that is made up stands in for it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from tbptt_ckpt import (
    TBPTT,
    ArgumentError,
    InfeasibleBudgetError,
    TensorSequence,
    measure_costs,
    profile_window,
)
from tbptt_ckpt.budget.amount import parse_budget
from tbptt_ckpt.budget.meter import WindowMeter
from tbptt_ckpt.memory.storages import tensor_bytes

pytestmark = pytest.mark.times_the_module

BUDGET = "tbptt_ckpt.budget"
STEPS, LANES, WIDTH, NUM_WINDOWS = 64, 16, 32, 3
ELSEWHERE = 300_000  # reserved for others in the process
EMPTIED_BY = "measuring", "measured_budget"  # and after a window that took too much
PIECES = 40_000  # reserved beside what is live at a peak, for nothing


class Caching:
    """Takes more than it hands out, and keeps what it took until its cache is emptied."""

    def __init__(self, monkeypatch, tbptt):
        self.held = (tbptt.parts.recurrence.module, tbptt.parts.updater.optimizer)
        self.kept, self.emptied_by = 0, []
        monkeypatch.setattr(f"{BUDGET}.reserved.reserved_memory", lambda device: self.now())
        for room in EMPTIED_BY:
            monkeypatch.setattr(f"{BUDGET}.{room}.empty_cache", partial(self.empty, room))
        monkeypatch.setattr(WindowMeter, "reserved_peak_bytes", property(self.peak))

    def now(self):
        return max(self.kept, ELSEWHERE + tensor_bytes(*self.held, grads=True))

    def peak(self, meter):
        self.kept = max(self.now(), ELSEWHERE + meter.peak_bytes + PIECES)
        return self.kept

    def empty(self, room):
        self.kept = 0
        self.emptied_by.append(room)


def make(**options):
    torch.manual_seed(0)
    module = nn.LSTMCell(1, WIDTH)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    given = {"measure_memory": True, "time_batching": False, **options}
    return TBPTT(module, loss_fn, STEPS, STEPS, optimizer, **given)


def loss_fn(h, targets):
    return nn.functional.mse_loss(h.mean(1, keepdim=True), targets)


def data():
    torch.manual_seed(1)
    return TensorSequence(*torch.randn(2, NUM_WINDOWS * STEPS, LANES, 1))


@pytest.fixture
def allocator(monkeypatch):
    monkeypatch.setattr(f"{BUDGET}.amount.reserved_memory", lambda device: 0)
    return partial(Caching, monkeypatch)


def test_it_is_kept_once_a_window_has_shown_what_is_reserved_beside_tensors(allocator):
    plain = [window.loss for window in make(strategy="retain").windows(data())]
    tbptt = make(memory_budget="480KB reserved")
    caching = allocator(tbptt)
    windows = list(tbptt.windows(data()))
    assert windows[0].reserved_peak_bytes > 480_000 > windows[0].peak_bytes + ELSEWHERE
    assert all(window.reserved_peak_bytes <= 480_000 for window in windows[1:])
    assert windows[-1].reserved_peak_bytes > 440_000
    assert tuple(dict.fromkeys(caching.emptied_by)) == EMPTIED_BY
    torch.testing.assert_close([window.loss for window in windows], plain)
    budget, resumed = tbptt.parts.budget, make(memory_budget="480KB reserved").parts.budget
    resumed.load_state_dict(budget.state_dict())
    assert resumed.state_dict() == budget.state_dict()


def test_one_of_allocated_bytes_that_is_too_small_says_what_is_reserved(allocator):
    tbptt = make(memory_budget=1)
    allocator(tbptt)
    words = r"^memory_budget=1 B is below the .* \(torch has \S+ KiB of cpu reserved\); raise it to"
    with pytest.raises(InfeasibleBudgetError, match=words):
        tbptt.train(data())


def test_one_that_is_too_small_says_what_is_reserved_beside_tensors(allocator):
    tbptt = make(memory_budget="350KB reserved")
    allocator(tbptt)
    words = (
        r"^memory_budget=341\.8 KiB reserved is below the (\S+ KiB) that a reach of 64 steps needs "
        r"\(torch has \S+ KiB of cpu reserved, \S+ KiB beside the run's tensors\); "
        r"raise it to (\d+) bytes reserved"
    )
    with pytest.raises(InfeasibleBudgetError, match=words) as raised:
        tbptt.train(data())
    smallest = raised.value.smallest_budget_bytes
    assert smallest > ELSEWHERE + 80_000
    again = make(memory_budget=f"{smallest + 1000} reserved")
    allocator(again)
    next(iter(again.windows(data())))


@pytest.mark.parametrize(
    "text", ["0.5 reserved", "50% reserved", "reserved", "1 GB reserved reserved"]
)
def test_it_is_a_size(text):
    with pytest.raises(ArgumentError, match=r"^--budget=.*reserved"):
        parse_budget(text, "--budget")
    assert parse_budget(" 2 GB  Reserved ").num_bytes == 2 * 10**9


def test_it_is_refused_where_nothing_is_reserved_or_nothing_is_trained():
    with pytest.raises(
        ArgumentError, match=r"'1GiB reserved' is of what .* of cpu reserves nothing"
    ):
        make(memory_budget="1GiB reserved")
    cell, (inputs, targets) = nn.LSTMCell(1, 2), torch.randn(2, 4, 1, 1)
    with pytest.raises(ArgumentError, match=r"^memory='1GiB reserved': reserved bytes depend on"):
        measure_costs(cell, loss_fn, inputs, targets, memory="1GiB reserved")
    with pytest.raises(
        ArgumentError, match=r"^memory_budget='1GiB reserved': reserved bytes depend"
    ):
        profile_window(cell, loss_fn, inputs, targets, k1=2, k2=2, memory_budget="1GiB reserved")
