"""Exact peaks against hand counts: flushing, timelines, nested regions."""

import gc
import os
import threading
from contextlib import nullcontext
from functools import partial
from itertools import groupby

import pytest
import torch
from measured_regions import MIB, CellLoop, blob, in_fresh_thread, measure, needs_proc, run_script
from torch import nn

from tbptt_ckpt.errors import ArgumentError, TbpttError
from tbptt_ckpt.memory import allocators as sources
from tbptt_ckpt.memory.available import free_memory
from tbptt_ckpt.memory.exhausted import older_garbage_kept
from tbptt_ckpt.memory.meter import can_measure, peak_memory
from tbptt_ckpt.memory.reading import reading, told_of_calls
from tbptt_ckpt.memory.recorders import KinetoRecorder, has_operator_callbacks


@pytest.fixture(autouse=True)
def quick_collection(): ...


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
        from tbptt_ckpt.memory.meter import peak_memory

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
        from tbptt_ckpt.memory.meter import peak_memory

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


def test_reading_while_modules_are_called_changes_no_figure_and_no_gradient(monkeypatch):
    """Forward every 64 calls; backward at the gradients of every 256th call's state."""
    cell, inputs = nn.LSTMCell(8, 8), torch.randn(600, 2, 8)
    source, reads = sources.cpu_source(), []
    drain = source.drain
    monkeypatch.setattr(source, "drain", lambda: (reads.append(1), drain()))

    def run(is_read):
        def work(meter):
            state, loss = None, 0.0
            with reading(meter.flush) if is_read else nullcontext():
                for each in inputs:
                    if (told := told_of_calls()) is not None:
                        told(partial(tuple, state or ()))
                    state = cell(each, state)
                    loss = loss + state[0].square().mean()
                reads.append("backward")
                loss.backward()

        cell.zero_grad()
        reads.clear()
        meter = measure(work)
        found = [list(group) for _, group in groupby(reads, key=lambda read: read == "backward")]
        return meter.peak_bytes, meter.net_bytes, found, [p.grad.clone() for p in cell.parameters()]

    (*whole, _, grads), (*read, found, read_grads) = run(False), run(True)
    assert [len(group) for group in found] == [600 // 64, 1, 2 * (600 // 256)]  # of h and c
    assert read == whole
    assert all(map(torch.equal, read_grads, grads))
    assert told_of_calls() is None


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
@pytest.mark.exhaustive
def test_the_meter_itself_stays_under_64_mib():
    """200,000 allocations and as many frees; without flushes far fewer take more than that."""
    script = """
        import json, sys, torch
        from tbptt_ckpt.memory.meter import peak_memory
        from tbptt_ckpt.memory.resident import RssSampler, rss_bytes
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
        assert has_operator_callbacks()
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
    assert not has_operator_callbacks()
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
        from tbptt_ckpt.memory.meter import peak_memory
        with peak_memory(rss=False) as meter:
            kept = torch.empty(1000)
            child = os.fork()
            if child == 0:
                os._exit(torch._C._autograd._profiler_enabled())
            status = os.waitpid(child, 0)[1]
        print(json.dumps([status, meter.peak_bytes]))
    """
    assert run_script(script) == [0, 4000]


@pytest.mark.parametrize("elsewhere", ["meta", "cuda:0", torch.device("xpu")])
def test_a_device_that_is_not_here_is_named(elsewhere):
    here = torch.accelerator.current_accelerator(check_available=True)
    if here is not None and here.type == torch.device(elsewhere).type:
        pytest.skip("it is here")
    for function in (peak_memory, free_memory, can_measure):
        with pytest.raises(ArgumentError, match="is not on this machine, which has cpu"):
            function(elsewhere)
