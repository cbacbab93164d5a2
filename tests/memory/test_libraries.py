"""What libraries keep of a device's memory is made before anything is metered, and counted once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiler

from tbptt_ckpt import (
    TBPTT,
    InfeasibleBudgetError,
    TensorSequence,
    measure_costs,
    profile_window,
)
from tbptt_ckpt.budget import measure, window_budget
from tbptt_ckpt.memory import libraries
from tbptt_ckpt.memory.meter import peak_memory
from tbptt_ckpt.profiling import predicting
from tbptt_ckpt.profiling.table import table_of

KEPT, DEVICE = 32 << 20, torch.device("cuda", 0)
MSE = nn.functional.mse_loss


def work():
    torch.manual_seed(0)
    return nn.GRU(4, 32), MSE, torch.randn(40, 4, 4), torch.randn(40, 4, 32)


@pytest.fixture
def kept(monkeypatch):
    """An allocator, faked, whose libraries keep so much; told how often it was asked."""
    asked = []
    for module in (measure, predicting, window_budget):
        monkeypatch.setattr(module, "library_bytes", lambda device: asked.append(device) or KEPT)
    return asked


def test_what_no_tensor_has_is_what_libraries_keep(monkeypatch):
    made = []  # which is done before anything is counted
    monkeypatch.setattr(libraries, "make_workspaces", made.append)
    storages = [
        SimpleNamespace(device=torch.device(where), nbytes=lambda: 1000)
        for where in ("cuda:0", "cuda:0", "cuda:1", "cpu")
    ]
    monkeypatch.setattr(libraries, "live_storages", lambda: storages)
    monkeypatch.setattr(torch.accelerator, "memory_allocated", lambda _: len(made) * KEPT + 2000)
    assert libraries.library_bytes(DEVICE) == KEPT
    assert libraries.library_bytes(torch.device("cpu")) == 0


def test_workspaces_are_made_before_a_meter_reads_once_for_a_stream(monkeypatch):
    done, stream = [], SimpleNamespace(stream_id=0)
    monkeypatch.setattr(libraries, "_made", set())
    monkeypatch.setattr(libraries, "multiply", lambda device: done.append("product"))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for name, function in {
        "current_accelerator": lambda check_available: torch.device("cuda"),
        "current_device_index": lambda: 0,
        "device_count": lambda: 1,
        "current_stream": lambda device: stream,
        "memory_stats": lambda device: done.append("reading") or {},
        "reset_peak_memory_stats": lambda device: None,
    }.items():
        monkeypatch.setattr(torch.accelerator, name, function)
    for stream_id in (0, 0, 7):
        stream.stream_id = stream_id
        with peak_memory("cuda", rss=False):
            done.append("region")
    around = ["reading", "region", "reading"]
    assert done == ["product", *around, *around, "product", *around]


def test_a_product_and_its_gradient_run_whatever_is_entered():
    with profiler(activities=[ProfilerActivity.CPU]) as seen, torch.inference_mode():
        libraries.multiply(torch.device("cpu"))
    assert sum(event.name == "aten::mm" for event in seen.events()) == 3


def test_a_process_that_has_not_used_a_device_makes_nothing_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(libraries, "multiply", lambda device: pytest.fail("on a device"))
    libraries.make_workspaces(DEVICE)


def windows(budget=None, strategy="uniform:8"):
    module, loss_fn, *steps = work()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    options = {"strategy": strategy, "memory_budget": budget, "measure_memory": True}
    return list(
        TBPTT(module, loss_fn, 20, 20, optimizer, **options).windows(TensorSequence(*steps))
    )


def smallest():
    with pytest.raises(InfeasibleBudgetError) as raised:
        windows(budget=1000)
    return raised.value.smallest_budget_bytes, str(raised.value)


def test_windows_and_budgets_count_it_once_and_errors_name_it(request):
    windows()  # the first of a process takes a little more
    before, (least, words) = [w.peak_bytes for w in windows()], smallest()
    assert "libraries" not in words
    asked = request.getfixturevalue("kept")
    found = windows()
    assert [window.peak_bytes - KEPT for window in found] == before
    assert len(asked) == 1
    more, words = smallest()
    assert more == least + KEPT
    assert "32.0 MiB of it what libraries keep" in words
    for window in windows(budget=more + 100_000):
        assert window.peak_bytes <= more + 100_000
        assert window.plan.predicted_peak_bytes == pytest.approx(window.peak_bytes, rel=0.01)


def test_reports_and_predictions_have_it_under_its_name(request):
    given = {"k1": 10, "k2": 20, "strategy": "uniform:8", "repeats": 1, "time_batching": False}
    before = profile_window(*work(), **given)
    request.getfixturevalue("kept")
    report = profile_window(*work(), **given)
    assert (before.library_bytes, report.library_bytes) == (0, KEPT)
    for name in ("peak_bytes", "fixed_bytes", "predicted_peak_bytes"):
        assert getattr(report, name) - getattr(before, name) == KEPT, name
    assert report.to_dict()["library_bytes"] == KEPT
    assert measure_costs(*work()).fixed.libraries == KEPT
    assert "and 32.0 MiB that libraries keep" in table_of([report], "", {}, 200)
