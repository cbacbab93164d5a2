"""Memory: exact peaks against hand counts and memray, resident memory, what is free."""

import gc
import importlib.util
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

from tbptt_ckpt.errors import ArgumentError, TbpttError
from tbptt_ckpt.memory import allocators as sources
from tbptt_ckpt.memory.available import free_memory
from tbptt_ckpt.memory.exhausted import older_garbage_kept
from tbptt_ckpt.memory.meter import can_measure, peak_memory
from tbptt_ckpt.memory.native import has_operator_callbacks
from tbptt_ckpt.memory.recorders import KinetoRecorder
from tbptt_ckpt.memory.resident import RssSampler, rss_bytes
from tbptt_ckpt.memory.sizes import format_bytes, parse_bytes
from tbptt_ckpt.memory.storages import tensor_bytes

MIB = 1024**2
LINUX = sys.platform == "linux"
needs_proc = pytest.mark.skipif(not LINUX, reason="reads /proc")
needs_accelerator = pytest.mark.skipif(
    not torch.accelerator.is_available(), reason="needs an accelerator"
)


def blob(num_bytes):
    return torch.empty(num_bytes, dtype=torch.uint8)


def measure(work, **options):
    """A meter after `work(meter)`; the resident memory is left out, being no matter here."""
    with peak_memory(**{"held": (), "rss": False, **options}) as meter:
        work(meter)
    return meter


def in_fresh_thread(work):
    """Result of `work()` on a thread that has never measured anything."""
    results = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    return results[0]


def run_script(script, *arguments):
    """What a script prints as JSON, run in a fresh process on one core."""
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


class CellLoop:
    """Plain BPTT over an LSTM cell, with something to call after each step."""

    def __init__(self, num_steps=30, lanes=4, width=16):
        self.cell = nn.LSTMCell(width, width)
        self.inputs = torch.randn(num_steps, lanes, width)

    def __call__(self, after_step=lambda step: None):
        state, loss = None, 0.0
        for step, inputs in enumerate(self.inputs):
            state = self.cell(inputs, state)
            loss = loss + state[0].square().mean()
            after_step(step)
        loss.backward()
        self.cell.zero_grad()


# --- the peak on the CPU ------------------------------------------------------------------


@pytest.mark.parametrize("num_bytes", [1, 7, 63, 64, 65, 4096, 100_001])
def test_every_byte_counts_and_nothing_is_rounded(num_bytes):
    meter = measure(lambda _: blob(num_bytes))
    assert (meter.peak_bytes, meter.net_bytes) == (num_bytes, 0)


def test_peak_and_net_match_a_count_by_hand():
    kept = []

    def work(_):
        first = blob(1000)
        second = blob(200)
        del first
        kept.append(blob(500))  # 700 live
        del second
        third = torch.zeros(100).double()  # 500 + 400 + 800
        del third

    meter = measure(work)
    assert (meter.peak_bytes, meter.net_bytes) == (1700, 500)


def test_views_and_storage_sharing_cost_nothing():
    meter = measure(lambda _: blob(100)[10:20].reshape(2, 5).t())
    assert meter.peak_bytes == 100


def test_an_empty_region_is_zero():
    meter = measure(lambda _: None)
    assert (meter.peak_bytes, meter.net_bytes) == (0, 0)
    assert [live for _, live in meter.timeline] == [0, 0]


def test_gradients_and_saved_tensors_count():
    weight = torch.ones(1000, requires_grad=True)
    kept = []

    def work(_):
        weight.exp().sum().backward()  # the result is saved: 4000; sum 4, its gradient 4
        kept.append(weight.grad)  # the product: 4000

    meter = measure(work)
    assert meter.net_bytes == 4000
    assert meter.peak_bytes == 8008


def test_a_backward_that_moves_to_another_thread_counts():
    """Autograd hands deep re-entrant backward passes to a thread of its own.

    In a fresh process: one with such threads cannot fork and differentiate, as other tests do.
    """
    script = """
        import json, threading, torch
        from tbptt_ckpt.memory import peak_memory

        threads = set()

        class Reentrant(torch.autograd.Function):
            @staticmethod
            def forward(ctx, tensor, depth):
                ctx.depth = depth
                return tensor.clone()

            @staticmethod
            def backward(ctx, grad):
                threads.add(threading.get_ident())
                if ctx.depth:
                    with torch.enable_grad():
                        inner = torch.ones(1, requires_grad=True)
                        Reentrant.apply(inner, ctx.depth - 1).sum().backward()
                else:
                    torch.empty(10**6, dtype=torch.uint8)
                return grad.clone(), None

        with peak_memory() as meter:
            Reentrant.apply(torch.ones(1, requires_grad=True), 80).sum().backward()
        print(json.dumps([len(threads), meter.net_bytes, meter.peak_bytes]))
    """
    num_threads, net_bytes, peak_bytes = run_script(script)
    assert num_threads > 1
    assert net_bytes == 0
    assert 10**6 <= peak_bytes < 1.1 * 10**6


def test_other_threads_are_not_counted():
    meter = measure(lambda _: in_fresh_thread(lambda: blob(1000).sum()))
    assert meter.peak_bytes == 0


def test_the_public_profiler_gives_the_same_figures(monkeypatch):
    """Two recorders, one account: bytes and order are equal, with flushes between."""
    loop = CellLoop()
    loop()

    def flushed_run():
        return measure(lambda meter: loop(lambda step: step % 7 or meter.flush()))

    draining = in_fresh_thread(flushed_run)
    monkeypatch.setattr(sources, "new_recorder", KinetoRecorder)
    public = in_fresh_thread(flushed_run)
    assert public.peak_bytes == draining.peak_bytes > 0
    assert public.net_bytes == draining.net_bytes
    assert [live for _, live in public.timeline] == [live for _, live in draining.timeline]


# --- tensors from before ------------------------------------------------------------------


@needs_proc
@pytest.mark.parametrize("named", [True, False])
def test_frees_of_older_tensors_count(named):
    older = [blob(1000)]

    def work(_):
        older.clear()
        blob(400)

    meter = measure(work, held=older if named else None)
    assert (meter.peak_bytes, meter.net_bytes) == (0, -1000)


def test_frees_of_older_tensors_that_are_not_named_do_not_count():
    """In a process that has profiled nothing: an earlier profiled block at the same address
    would leave its size in the allocator's table, and the free would report that."""
    script = """
        import json, torch
        from tbptt_ckpt.memory import peak_memory

        older = [torch.empty(123_457, dtype=torch.uint8)]
        with peak_memory(held=(), rss=False) as meter:
            older.clear()
        print(json.dumps([meter.peak_bytes, meter.net_bytes]))
    """
    assert run_script(script) == [0, 0]


@needs_proc
def test_a_free_is_never_reported_with_the_size_of_an_earlier_block():
    """torch's profiler does so when an address is used again behind its back."""

    def reused_addresses(size):
        blocks = []
        measure(lambda _: blocks.extend(blob(size) for _ in range(50)))
        addresses = {block.data_ptr() for block in blocks}
        blocks.clear()  # freed unobserved: the allocator's table keeps their sizes
        blocks.extend(blob(size - 50) for _ in range(50))
        reused = sum(block.data_ptr() in addresses for block in blocks)
        meter = measure(lambda _: blocks.clear(), held=blocks)
        assert meter.net_bytes == -50 * (size - 50)
        return reused

    assert sum(reused_addresses(size) for size in (1000, 5000, 50_000)) > 0


@needs_proc
def test_gradients_zeroed_inside_count():
    layer = nn.Linear(10, 10)
    layer(torch.ones(1, 10)).sum().backward()
    for held in (None, layer):
        layer(torch.ones(1, 10)).sum().backward()
        meter = measure(lambda _: layer.zero_grad(), held=held)
        assert meter.net_bytes == -440


def test_memory_of_other_owners_is_left_alone():
    """numpy frees its own memory, unseen: naming it must not leave a stale entry behind."""
    arrays = [torch.from_numpy(torch.ones(100).numpy().copy())]
    assert measure(lambda _: arrays.clear(), held=arrays).net_bytes == 0


def test_garbage_from_before_is_kept_and_newer_garbage_is_not():
    class Circle:
        def __init__(self):
            self.me, self.tensor = self, blob(5000)

    def work(_):
        with older_garbage_kept():
            gc.collect()
            Circle()
            gc.collect()

    gc.collect()
    measure(lambda _: Circle())  # profiled, so that its free would be reported
    assert measure(work).net_bytes == 0
    assert gc.get_freeze_count() == 0
    gc.freeze()
    try:
        assert measure(work).net_bytes == 0
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


def test_shared_memory_counts_without_being_named():
    kept = []
    meter = measure(lambda _: kept.append(torch.ones(100).share_memory_()))
    assert (meter.peak_bytes, meter.net_bytes) == (800, 400)
    assert measure(lambda _: kept.clear()).net_bytes == -400


# --- flushing -----------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 4, 29])
def test_flushing_changes_no_figure(every):
    loop = CellLoop()
    loop()
    whole = measure(lambda _: loop())
    flushed = measure(lambda meter: loop(lambda step: step % every or meter.flush()))
    assert flushed.peak_bytes == whole.peak_bytes
    assert flushed.net_bytes == whole.net_bytes
    assert [live for _, live in flushed.timeline] == [live for _, live in whole.timeline]


def test_flushing_during_backward_changes_no_figure_and_no_gradient(monkeypatch):
    cell, inputs = nn.LSTMCell(8, 8), torch.randn(100, 2, 8)
    source, flushes = sources.cpu_source(), []
    drain = source.drain
    monkeypatch.setattr(source, "drain", lambda: (flushes.append(1), drain()))

    def run(flush_every):
        def work(meter):
            state, loss = None, 0.0
            for step, each in enumerate(inputs):
                state = cell(each, state)
                loss = loss + state[0].square().mean()
                if step % flush_every == flush_every - 1:
                    meter.flush_on_gradient(*state)
            flushes.clear()
            loss.backward()

        cell.zero_grad()
        meter = measure(work)
        return meter.peak_bytes, meter.net_bytes, [each.grad.clone() for each in cell.parameters()]

    whole, flushed = run(10**9), run(10)
    assert len(flushes) == 20  # h and c of ten steps
    assert flushed[:2] == whole[:2]
    assert all(torch.equal(*pair) for pair in zip(flushed[2], whole[2], strict=True))


def test_a_peak_between_two_flushes_is_found():
    def work(meter):
        kept = blob(100)
        meter.flush()
        blob(5000)
        meter.flush()
        del kept

    meter = measure(work)
    assert meter.peak_bytes == 5100
    assert (meter.peak_bytes, meter.net_bytes) == (5100, 0)


def test_figures_are_current_after_a_flush():
    with peak_memory(held=(), rss=False) as meter:
        kept = blob(100)
        meter.flush()
        assert (meter.peak_bytes, meter.net_bytes) == (100, 100)
        del kept
    assert meter.net_bytes == 0


def test_flushing_from_a_foreign_thread_raises():
    def flush():
        with pytest.raises(TbpttError, match="on the thread that entered"):
            meter.flush()
        return True

    with peak_memory(held=(), rss=False) as meter:
        assert in_fresh_thread(flush)


@needs_proc
def test_the_meter_itself_stays_under_64_mib():
    """200,000 allocations and as many frees; without flushes far fewer take more than that."""
    script = """
        import json, sys, torch
        from tbptt_ckpt.memory import peak_memory, rss_bytes, RssSampler
        flushing = sys.argv[1] == "flush"
        num_blocks = 200_000 if flushing else 100_000
        with peak_memory():
            torch.empty(1)
        before = rss_bytes()
        with RssSampler(0.001) as rss, peak_memory() as meter:
            for step in range(num_blocks):
                torch.empty(step % 100 + 1, dtype=torch.uint8)
                if flushing and step % 10_000 == 0:
                    meter.flush()
        print(json.dumps({
            "anonymous": rss.peak_anonymous_bytes - before.anonymous,
            "total": rss.peak_bytes - before.total,
            "peak": meter.peak_bytes,
            "net": meter.net_bytes,
            "points": len(meter.timeline),
        }))
    """
    flushed, whole = run_script(script, "flush"), run_script(script, "whole")
    assert flushed["anonymous"] < 64 * MIB
    assert flushed["total"] < 64 * MIB
    assert flushed["points"] <= 8500
    assert (flushed["peak"], flushed["net"]) == (whole["peak"], whole["net"]) == (100, 0)
    assert whole["total"] > 64 * MIB  # the test would notice if flushing did nothing


# --- the timeline -------------------------------------------------------------------------


def test_the_timeline_is_every_change_of_a_short_region():
    def work(_):
        first = blob(10)
        second = blob(20)
        del first, second

    meter = measure(work)
    assert [live for _, live in meter.timeline] == [0, 10, 30, 20, 0, 0]
    seconds = [when for when, _ in meter.timeline]
    assert seconds == sorted(seconds)
    assert seconds[0] == 0


@pytest.mark.parametrize("peak_at", [0, 1, 11_111, 29_999])
@pytest.mark.parametrize("flush_every", [10**9, 777])
def test_a_thinned_timeline_holds_the_peak_and_both_ends(peak_at, flush_every):
    def work(meter):
        for step in range(30_000):
            blob(10_001 if step == peak_at else step % 50 + 1)
            if step % flush_every == flush_every - 1:
                meter.flush()

    meter = measure(work)
    live = [each for _, each in meter.timeline]
    assert max(live) == meter.peak_bytes == 10_001
    assert min(live) == live[0] == live[-1] == 0
    assert len(live) <= 8500


# --- starting, ending, nesting ------------------------------------------------------------


def test_nested_regions_each_see_their_own():
    with peak_memory(held=(), rss=False) as outer:
        blob(300)
        kept = blob(100)
        with peak_memory(held=(), rss=False) as inner:
            blob(150)
        blob(10)
        del kept
    assert (inner.peak_bytes, inner.net_bytes) == (150, 0)
    assert (outer.peak_bytes, outer.net_bytes) == (300, 0)


@needs_proc
@pytest.mark.parametrize("held_inside", [None, "kept"])
def test_an_inner_region_leaves_the_outer_one_exact(held_inside):
    with peak_memory(held=(), rss=False) as outer:
        kept = [blob(100)]
        with peak_memory(held=None if held_inside is None else kept, rss=False) as inner:
            kept.clear()
            blob(60)
    assert (inner.peak_bytes, inner.net_bytes) == (0, -100)
    assert outer.peak_bytes == 100
    assert outer.net_bytes == 0


def test_regions_may_end_in_any_order():
    first, second = peak_memory(held=(), rss=False), peak_memory(held=(), rss=False)
    first.__enter__()
    blob(10)
    second.__enter__()
    blob(20)
    first.__exit__(None, None, None)
    blob(30)
    second.__exit__(None, None, None)
    assert (first.peak_bytes, second.peak_bytes) == (20, 30)


def test_threads_measure_independently():
    inside = threading.Barrier(2, timeout=60)

    def region(num_bytes):
        def work(_):
            inside.wait()
            blob(num_bytes)
            inside.wait()

        return measure(work).peak_bytes

    peaks = {}
    threads = [
        threading.Thread(target=lambda size=size: peaks.update({size: region(size)}))
        for size in (1000, 2000)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert peaks == {1000: 1000, 2000: 2000}


def recorded_names():
    """Names of the operations that a profiler sees now."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ones(3).add(1)
    return {event.name for event in profile.events()}


def test_other_observers_of_operators_are_left_in_place(tmp_path):
    """The cheap recorder would take them away; the other one is used instead."""
    observer = torch.profiler.ExecutionTraceObserver()
    observer.register_callback(str(tmp_path / "trace.json"))
    observer.start()
    try:
        meter = measure(lambda _: blob(100))
        assert has_operator_callbacks()()
    finally:
        observer.stop()
        observer.unregister_callback()
    assert (meter.peak_bytes, meter.net_bytes) == (100, 0)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_stays_on_after_the_region(fails):
    def work(meter):
        assert torch._C._autograd._profiler_enabled()
        meter.flush()
        if fails:
            raise ZeroDivisionError

    if fails:
        with pytest.raises(ZeroDivisionError):
            measure(work)
    else:
        measure(work)
    assert not torch._C._autograd._profiler_enabled()
    assert not has_operator_callbacks()()
    assert "aten::add" in recorded_names()


def test_another_profiler_on_the_thread_is_named():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert not can_measure()
        with pytest.raises(TbpttError, match="a torch profiler is active"):
            measure(lambda _: None)
    assert can_measure()
    measure(lambda _: can_measure() or pytest.fail("a region inside a region can start"))


def test_a_meter_measures_once():
    meter = measure(lambda _: None)
    with pytest.raises(TbpttError, match="measures one region"):
        meter.__enter__()
    meter.flush()  # harmless afterwards: hooks of a later backward may call it


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_inside_a_region_does_not_record_for_ever():
    script = """
        import json, os, torch
        from tbptt_ckpt.memory import peak_memory
        with peak_memory(rss=False) as meter:
            kept = torch.empty(1000)
            child = os.fork()
            if child == 0:
                os._exit(torch._C._autograd._profiler_enabled())
            status = os.waitpid(child, 0)[1]
        print(json.dumps([status, meter.peak_bytes]))
    """
    assert run_script(script) == [0, 4000]


@pytest.mark.parametrize("device", ["meta", "cuda:0", torch.device("mps")])
def test_a_device_that_is_not_here_is_named(device):
    here = torch.accelerator.current_accelerator(check_available=True)
    if here is not None and here.type == torch.device(device).type:
        pytest.skip("it is here")
    for function in (peak_memory, free_memory, can_measure):
        with pytest.raises(ArgumentError, match="is not on this machine, which has cpu"):
            function(device)


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

    def test_free_memory_is_what_is_left(self):
        before = free_memory(self.device)
        kept = self.blob(64 * MIB)
        assert before - free_memory(self.device) >= 60 * MIB
        del kept


class FakeAllocator:
    """An accelerator's allocator statistics; stands in for `torch.accelerator`."""

    def __init__(self):
        self.live = self.peak = self.reserved = self.retried = 0

    def change(self, num_bytes):
        self.live += num_bytes
        self.peak = max(self.peak, self.live)
        self.reserved = max(self.reserved, self.live + 7)

    def install(self, monkeypatch):
        for name, function in {
            "current_accelerator": lambda check_available: torch.device("cuda"),
            "current_device_index": lambda: 3,
            "max_memory_allocated": lambda device: self.peak,
            "max_memory_reserved": lambda device: self.reserved,
            "memory_allocated": lambda device: self.live,
            "memory_reserved": lambda device: self.reserved,
            "memory_stats": lambda device: {"num_alloc_retries": self.retried},
            "get_memory_info": lambda device: (1000, 5000),
            "reset_peak_memory_stats": lambda device: setattr(self, "peak", self.live),
        }.items():
            monkeypatch.setattr(torch.accelerator, name, function)
        return self


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
    assert (inner.allocation_retries, outer.allocation_retries) == (1, 1)


def test_free_accelerator_memory_includes_the_allocators_idle_blocks(monkeypatch):
    memory = FakeAllocator().install(monkeypatch)
    memory.change(500)
    memory.change(-200)
    assert free_memory("cuda") == 1000 + 207


# --- bytes of trees -----------------------------------------------------------------------

Pair = namedtuple("Pair", "first second")


@dataclass
class Box:
    tensor: torch.Tensor
    note: str = ""


def test_a_storage_counts_once_and_whole():
    base = blob(100)
    assert tensor_bytes(base[:10]) == 100
    assert tensor_bytes(base, base.view(10, 10), [base.t()]) == 100


def test_nested_trees_are_searched():
    tree = {"a": [blob(1), (blob(2), None)], "b": Pair(Box(blob(4)), {"c": blob(8)}), "d": 3}
    assert tensor_bytes(tree) == 15
    assert tensor_bytes() == tensor_bytes(None, "text") == 0


def test_modules_gradients_and_optimizers():
    module = nn.Sequential(nn.Linear(3, 2, bias=False), nn.BatchNorm1d(2))
    weights, buffers = 24 + 16, 16 + 8
    assert tensor_bytes(module) == weights + buffers
    module(torch.randn(4, 3)).sum().backward()
    assert tensor_bytes(module) == weights + buffers
    assert tensor_bytes(module, grads=True) == 2 * weights + buffers
    optimizer = torch.optim.Adam(module.parameters())
    assert tensor_bytes(optimizer) == 0
    optimizer.step()
    assert tensor_bytes(optimizer) == 2 * weights + 3 * 4  # two moments, a step count each
    assert tensor_bytes(module, optimizer) == tensor_bytes(module) + tensor_bytes(optimizer)


def test_tied_weights_count_once():
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    assert tensor_bytes(nn.ModuleList([first, second])) == tensor_bytes([first], {second}) == 64


def test_sparse_and_meta_tensors():
    sparse = torch.eye(10).to_sparse()
    assert tensor_bytes(sparse) == 2 * 10 * 8 + 10 * 4
    assert tensor_bytes(torch.empty(10, device="meta"), torch.empty(5, device="meta")) == 60


def test_modules_that_have_no_weights_yet_hold_nothing():
    module = nn.LazyLinear(3)
    assert tensor_bytes(module) == 0
    assert measure(lambda _: None, held=None).net_bytes == 0  # looks at every live tensor


def test_looking_is_invisible_to_modes_and_subclasses():
    class Refusing(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            raise AssertionError(function)

    tensor = torch.ones(4).as_subclass(Refusing)
    assert tensor_bytes([tensor], grads=True) == 16
    assert measure(lambda _: None, held=None).net_bytes == 0


def test_a_tensor_made_of_tensors_holds_those():
    ragged = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    assert tensor_bytes(ragged) == 5 * 4 + 3 * 8  # values and offsets


# --- resident memory ----------------------------------------------------------------------


def test_resident_bytes_agree_with_psutil():
    ours, theirs = rss_bytes(), psutil.Process().memory_info().rss
    assert ours.total == pytest.approx(theirs, rel=0.05)
    assert 0 < ours.anonymous <= ours.total
    assert ours.anonymous + ours.file_backed <= ours.total


def test_resident_bytes_without_proc(monkeypatch, tmp_path):
    monkeypatch.setattr("tbptt_ckpt.memory.resident._STATUS", tmp_path / "missing")
    assert rss_bytes().total == pytest.approx(psutil.Process().memory_info().rss, rel=0.05)
    with RssSampler(0.001) as rss:
        time.sleep(0.01)
    assert rss.source == "sampled"
    assert rss.peak_bytes > 0


@needs_proc
def test_the_sampler_sees_a_spike_that_is_gone_again():
    before = rss_bytes()
    with RssSampler(0.001) as rss:
        spike = bytearray(64 * MIB)
        spike[::4096] = b"x" * len(spike[::4096])
        time.sleep(0.1)
        del spike
    assert rss.peak_anonymous_bytes >= before.anonymous + 60 * MIB
    assert rss.peak_bytes >= rss.peak_anonymous_bytes
    assert not any(thread.name == "rss-sampler" for thread in threading.enumerate())


@needs_proc
def test_a_record_high_is_taken_from_the_kernel():
    """A spike between two samples is not missed where the kernel's mark rises."""
    script = """
        import json
        from tbptt_ckpt.memory import RssSampler, rss_bytes
        before = rss_bytes()
        with RssSampler(interval_seconds=3600) as rss:
            spike = bytearray(300 << 20)
            spike[::4096] = b"x" * len(spike[::4096])
            del spike
        print(json.dumps([rss.source, rss.peak_bytes - before.total]))
    """
    source, rise = run_script(script)
    assert source == "VmHWM"
    assert rise >= 290 * MIB


def test_a_region_reports_resident_memory_unless_told_not_to():
    with peak_memory() as meter:
        pass
    assert meter.rss_peak_bytes > 10 * MIB
    assert meter.rss_source in ("VmHWM", "sampled")
    meter = measure(lambda _: None)
    assert (meter.rss_peak_bytes, meter.rss_source) == (None, None)


# --- sizes as text ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1024 * 1023.94, "1023.9 KiB"),
        (1024 * 1023.96, "1.0 MiB"),
        (12.3 * MIB, "12.3 MiB"),
        (-(1024**3), "-1.0 GiB"),
        (2**40, "1.0 TiB"),
        (2**60, "1048576.0 TiB"),
    ],
)
def test_bytes_read_well(num_bytes, text):
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("value", "num_bytes"),
    [
        (0, 0),
        (12345, 12345),
        ("4096", 4096),
        ("4096 B", 4096),
        ("512MiB", 512 * MIB),
        (" 1.5 gib ", 3 * 2**29),
        ("2KiB", 2048),
        ("1TiB", 2**40),
        ("2kB", 2000),
        ("200 MB", 200_000_000),
        ("1GB", 10**9),
        ("0.1KiB", 102),
        (".5KB", 500),
    ],
)
def test_sizes_are_understood(value, num_bytes):
    parsed = parse_bytes(value)
    assert parsed == num_bytes
    assert type(parsed) is int


@pytest.mark.parametrize("value", [-1, "-1MiB", "nan", "inf", "", "MiB", "512M", "1e9", "1,5GiB"])
def test_nonsense_sizes_are_named(value):
    with pytest.raises(ArgumentError, match=r"memory_budget=.* is not a size: .*512MiB"):
        parse_bytes(value, "memory_budget")


@pytest.mark.parametrize("value", [True, None, 1.5, float("nan"), b"1MiB", [1]])
def test_sizes_of_other_types_are_named(value):
    with pytest.raises(ArgumentError, match="write bytes as an integer"):
        parse_bytes(value)


# --- what is free -------------------------------------------------------------------------


def write_tree(root: Path, files: dict[str, object]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


@pytest.fixture
def _ram(monkeypatch):
    """A machine with 1,000,000 bytes of RAM available."""
    memory = namedtuple("memory", "available")(1_000_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


V1, V2 = "sys/fs/cgroup/memory", "sys/fs/cgroup"
V1_UNLIMITED = 9223372036854771712


@pytest.mark.usefixtures("_ram")
@pytest.mark.parametrize(
    ("files", "free"),
    [
        pytest.param({}, 1_000_000, id="no groups"),
        pytest.param(
            {
                "proc/self/cgroup": "0::/job",
                f"{V2}/job/memory.max": 5000,
                f"{V2}/job/memory.current": 2000,
            },
            3000,
            id="v2",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "0::/job",
                f"{V2}/job/memory.max": "max",
                f"{V2}/job/memory.current": 2000,
            },
            1_000_000,
            id="v2 unlimited",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "0::/job",
                f"{V2}/job/memory.max": 5000,
                f"{V2}/job/memory.high": 4000,
                f"{V2}/job/memory.current": 2000,
                f"{V2}/job/memory.stat": "anon 500\ninactive_file 1500\nactive_file 10",
            },
            3500,
            id="v2 throttled, with droppable cache",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "0::/slice/job",
                f"{V2}/slice/job/memory.max": 5000,
                f"{V2}/slice/job/memory.current": 100,
                f"{V2}/slice/memory.max": 6000,
                f"{V2}/slice/memory.current": 5900,
            },
            100,
            id="v2, the parent is fuller",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "0::/../host/path",
                f"{V2}/memory.max": 5000,
                f"{V2}/memory.current": 1,
            },
            4999,
            id="v2 in a container",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "5:cpu:/x\n4:memory:/job\n0::/",
                f"{V1}/job/memory.limit_in_bytes": 5000,
                f"{V1}/job/memory.usage_in_bytes": 2000,
                f"{V1}/job/memory.stat": "inactive_file 1\ntotal_inactive_file 700",
                f"{V1}/memory.limit_in_bytes": V1_UNLIMITED,
                f"{V1}/memory.usage_in_bytes": 9999,
            },
            3700,
            id="v1",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "4:cpu,memory:/docker/abc",
                f"{V1}/memory.limit_in_bytes": 5000,
                f"{V1}/memory.usage_in_bytes": 4000,
            },
            1000,
            id="v1 in a container",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "0::/job",
                f"{V2}/unified/job/memory.max": 5000,
                f"{V2}/unified/job/memory.current": 6000,
            },
            0,
            id="hybrid, already over",
        ),
    ],
)
def test_free_memory_heeds_the_container(tmp_path, files, free):
    assert free_memory(root=write_tree(tmp_path, files)) == free


def test_free_memory_of_this_machine():
    assert 0 < free_memory() <= psutil.virtual_memory().total
    assert free_memory("cpu") > 0
