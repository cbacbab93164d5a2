"""Exact peaks against memray, and on accelerators."""

import importlib.util

import pytest
import torch
from measured_regions import MIB, needs_accelerator, run_script

from tbptt_ckpt.budget.amount import parse_budget
from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.memory.available import free_memory
from tbptt_ckpt.memory.libraries import library_bytes
from tbptt_ckpt.memory.meter import can_measure, peak_memory

# --- against memray -----------------------------------------------------------------------

REGIONS = """
    import json, sys, torch
    from torch import nn

    torch.manual_seed(0)
    lanes, width, steps = 256, 160, 60
    inputs = torch.randn(steps, lanes, width)
    cell, lstm, gru = (kind(width, width) for kind in (nn.LSTMCell, nn.LSTM, nn.GRU))
    zeros = torch.zeros(lanes, width)

    def roll(start, stop, state):
        loss = 0.0
        for step in range(start, stop):
            state = cell(inputs[step], state)
            loss = loss + state[0].square().mean()
        return loss, state

    def plain():
        roll(0, steps, (zeros, zeros))[0].backward()
        cell.zero_grad()

    def replay():
        cuts = [(start, start + 20) for start in range(0, steps, 20)]
        states = [(zeros, zeros)]
        with torch.no_grad():
            for cut in cuts[:-1]:
                states.append(roll(*cut, states[-1])[1])
        grads = None
        while cuts:
            state = [each.clone().requires_grad_() for each in states.pop()]
            loss, ends = roll(*cuts.pop(), state)
            heads, seeds = ([loss, *ends], [torch.ones(()), *grads]) if grads else ([loss], None)
            torch.autograd.backward(heads, seeds)
            grads = [each.grad for each in state]
            del loss, ends, heads, seeds, state
        cell.zero_grad()

    def fused_lstm():
        lstm(inputs[:20])[0].square().mean().backward()
        lstm.zero_grad()

    def fused_gru():
        gru(inputs)[0].square().mean().backward()
        gru.zero_grad()

    regions = {each.__name__: each for each in (plain, replay, fused_lstm, fused_gru)}
    for region in regions.values():
        region()
"""
BY_METER = """
    from tbptt_ckpt.memory import peak_memory
    def peak(region):
        with peak_memory() as meter:
            region()
        return meter.peak_bytes
"""
BY_MEMRAY = """
    import memray, pathlib
    def peak(region):
        file = pathlib.Path(sys.argv[1]) / region.__name__
        with memray.Tracker(file):
            region()
        records = memray.FileReader(file).get_high_watermark_allocation_records()
        return sum(record.size for record in records)
"""
PRINT_PEAKS = """
    print(json.dumps({name: peak(region) for name, region in regions.items()}))
"""


@pytest.mark.skipif(not importlib.util.find_spec("memray"), reason="needs memray")
def test_peaks_agree_with_memray_within_three_percent(tmp_path):
    """memray counts every malloc, so also autograd's nodes; large tensors make those small."""
    ours = run_script(REGIONS + BY_METER + PRINT_PEAKS)
    theirs = run_script(REGIONS + BY_MEMRAY + PRINT_PEAKS, str(tmp_path))
    assert ours.keys() == {"plain", "replay", "fused_lstm", "fused_gru"}
    for region, peak in ours.items():
        assert 20 * MIB < peak < 128 * MIB
        assert peak == pytest.approx(theirs[region], rel=0.03), region
    assert ours["replay"] < 0.5 * ours["plain"]


# --- accelerators -------------------------------------------------------------------------


@pytest.mark.cuda
@needs_accelerator
class TestAccelerator:
    device = torch.accelerator.current_accelerator()

    def blob(self, num_bytes):
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def test_peak_net_and_reserved(self):
        self.blob(1)
        with peak_memory(self.device) as meter:
            kept = self.blob(4 * MIB)
            self.blob(8 * MIB)
        assert (meter.peak_bytes, meter.net_bytes) == (12 * MIB, 4 * MIB)
        assert meter.reserved_peak_bytes >= meter.peak_bytes
        assert meter.allocation_retries in (0, None)
        del kept

    def test_older_frees_flushes_and_nesting(self):
        older = self.blob(4 * MIB)
        with peak_memory(self.device) as outer:
            del older
            self.blob(16 * MIB)
            outer.flush()
            with peak_memory(self.device) as inner:
                self.blob(2 * MIB)
        assert (inner.peak_bytes, inner.net_bytes) == (2 * MIB, 0)
        assert (outer.peak_bytes, outer.net_bytes) == (12 * MIB, -4 * MIB)
        assert max(live for _, live in outer.timeline) == outer.peak_bytes

    def test_products_find_their_workspaces_made(self):
        self.blob(1)  # the device is in use
        with peak_memory(self.device) as meter:
            factor = torch.ones(64, 64, device=self.device, requires_grad=True)
            (factor @ factor).sum().backward()
        assert meter.net_bytes == 2 * factor.nbytes
        if self.device.type == "cuda":
            assert library_bytes(torch.device("cuda", torch.cuda.current_device())) > 0

    def test_requested_is_what_was_asked_for(self):
        with peak_memory(self.device):
            self.blob(1)  # the device is in use, and libraries have what they keep
        before = torch.accelerator.memory_stats(self.device)["requested_bytes.all.current"]
        with peak_memory(self.device) as meter:
            self.blob(4 * MIB + 1)
        assert meter.requested_peak_bytes - before == 4 * MIB + 1
        assert meter.peak_bytes > 4 * MIB + 1

    def test_free_memory_is_within_what_the_process_may_have(self):
        module = torch.get_device_module(self.device)
        before, total = free_memory(self.device), torch.accelerator.get_memory_info(self.device)[1]
        module.set_per_process_memory_fraction(0.05)
        try:
            assert free_memory(self.device) <= 0.05 * total
        finally:
            module.set_per_process_memory_fraction(1.0)
        assert free_memory(self.device) == pytest.approx(before, rel=0.05)

    def test_free_memory_is_what_is_left(self):
        before = free_memory(self.device)
        kept = self.blob(64 * MIB)
        assert before - free_memory(self.device) >= 60 * MIB
        del kept


class FakeAllocator:
    """An accelerator's allocator statistics; stands in for `torch.accelerator`."""

    def __init__(self):
        self.live = self.peak = self.reserved = self.retried = self.readings = 0

    def change(self, num_bytes):
        self.live += num_bytes
        self.peak = max(self.peak, self.live)
        self.reserved = max(self.reserved, self.live + 7)

    def statistics(self, device):
        self.readings += 1
        return {
            "allocated_bytes.all.current": self.live,
            "allocated_bytes.all.peak": self.peak,
            "reserved_bytes.all.current": self.reserved,
            "reserved_bytes.all.peak": self.reserved,
            "requested_bytes.all.peak": self.peak - 1,
            "num_alloc_retries": self.retried,
        }

    def install(self, monkeypatch):
        for name, function in {
            "current_accelerator": lambda check_available: torch.device("cuda"),
            "current_device_index": lambda: 3,
            "max_memory_allocated": lambda device: self.statistics(device) and self.peak,
            "max_memory_reserved": lambda device: self.statistics(device) and self.reserved,
            "memory_allocated": lambda device: self.statistics(device) and self.live,
            "memory_reserved": lambda device: self.statistics(device) and self.reserved,
            "memory_stats": self.statistics,
            "get_memory_info": lambda device: (1000, 5000),
            "reset_peak_memory_stats": lambda device: setattr(self, "peak", self.live),
        }.items():
            monkeypatch.setattr(torch.accelerator, name, function)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
        self.share(monkeypatch, 1.0)
        return self

    def share(self, monkeypatch, fraction):
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: fraction)


def test_accelerator_figures_come_from_its_statistics(monkeypatch):
    memory = FakeAllocator().install(monkeypatch)
    memory.change(500)  # from before
    memory.change(400)
    memory.change(-400)
    with peak_memory("cuda", rss=False) as outer:
        memory.change(-300)
        memory.change(600)
        with peak_memory("cuda:3", rss=False) as inner:
            memory.change(50)
            memory.change(-60)
            memory.retried += 1
        outer.flush()
        memory.change(-90)
    assert (inner.peak_bytes, inner.net_bytes) == (50, -10)
    assert (outer.peak_bytes, outer.net_bytes) == (350, 200)
    assert [live for _, live in outer.timeline] == [0, 300, 300, 350, 290, 290, 290, 290, 200, 200]
    assert outer.reserved_peak_bytes == 907
    assert (outer.requested_peak_bytes, inner.requested_peak_bytes) == (849, 849)
    assert (inner.allocation_retries, outer.allocation_retries) == (1, 1)


def test_an_accelerators_statistics_are_read_once_for_a_lap(monkeypatch):
    memory = FakeAllocator().install(monkeypatch)
    with peak_memory("cuda", rss=False) as meter:
        assert memory.readings == 1
        meter.lap()
        assert memory.readings == 2
    assert memory.readings == 3
    assert meter.allocation_retries == 0


def test_free_accelerator_memory_includes_the_allocators_idle_blocks(monkeypatch):
    memory = FakeAllocator().install(monkeypatch)
    memory.change(500)
    memory.change(-200)
    assert free_memory("cuda") == 1000 + 207


@pytest.mark.parametrize(("fraction", "left"), [(0.15, 750 - 507 + 207), (0.1, 207)])
def test_free_accelerator_memory_is_what_the_process_may_have(monkeypatch, fraction, left):
    """The device has 5000 bytes, of which 507 are reserved and 300 allocated."""
    memory = FakeAllocator().install(monkeypatch)
    memory.change(500)
    memory.change(-200)
    memory.share(monkeypatch, fraction)
    assert free_memory("cuda") == left
    assert parse_budget(1.0).bytes_beside(300, torch.device("cuda")) == 300 + left


@pytest.mark.parametrize(("count", "has"), [(1, "index 0 alone"), (4, "indices 0 to 3")])
@pytest.mark.parametrize("ask", [free_memory, peak_memory, can_measure])
def test_a_device_of_an_index_that_is_not_there_is_refused(monkeypatch, ask, count, has):
    FakeAllocator().install(monkeypatch)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    words = f"device='cuda:7' is not on this machine, whose cuda has {has}"
    with pytest.raises(ArgumentError, match=words):
        ask("cuda:7")
