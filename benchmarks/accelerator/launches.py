"""What the host asks of the device: kernels a step, and how often a window waits."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.accelerator.bench import Bench
from benchmarks.accelerator.check import Check, info, promised, skipped
from benchmarks.accelerator.modules import LinearCell, mse
from benchmarks.waits import Waits
from tbptt_ckpt import TBPTT, TensorSequence, Trainer, run_window

RUNS = {
    "k1 = k2": (64, 64, {}),
    "refresh, k2 = 4 k1": (64, 256, {}),
    "stale, k2 = 16 k1": (16, 256, {"overlap": "stale"}),
}


def waits(bench: Bench) -> Iterator[Check]:
    """A warm window waits for the device once, under every overlap and in a trainer."""
    if not bench.is_accelerator:
        yield skipped("waits of a window", "nothing waits for a CPU")
        return
    for what, (k1, k2, options) in RUNS.items():
        for is_trained in (False, True):
            counted = _waits_of_a_window(bench, k1, k2, is_trained, options)
            name = f"{'Trainer' if is_trained else 'TBPTT'}, {what}"
            yield promised(counted.total() <= 1, name, waits=counted.total(), lines=dict(counted))


def _waits_of_a_window(
    bench: Bench, k1: int, k2: int, is_trained: bool, options: dict[str, Any]
) -> Counter[str]:
    """By line, of which CUDA itself sees more than we do."""
    data = bench.randn(k2 + 8 * k1 + 1, 8, 64)
    module = nn.LSTM(64, 64).to(bench.device)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    tbptt = TBPTT(module, mse, k1, k2, optimizer, strategy="uniform:32", **options)
    sequence = TensorSequence(data[:-1], data[1:])
    windows = iter(Trainer(tbptt, sequence).windows() if is_trained else tbptt.windows(sequence))
    for _ in range(k2 // k1 + 4):
        next(windows)
    bench.wait()
    if bench.is_cuda:
        return _seen_by_cuda(windows)
    with Waits() as counted:
        next(windows)
    windows.close()
    return counted.found


def _seen_by_cuda(windows: Any) -> Counter[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            next(windows)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    windows.close()
    places = (f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchron" in str(w.message))
    return Counter(places)


def kernels(bench: Bench) -> Iterator[Check]:
    """Kernels a step, and whether torch's fused cell still is what runs."""
    if not bench.is_cuda:
        yield skipped("kernels a step", "only CUDA's profiler counts them")
        return
    steps, lanes, width = (32, 2, 16) if bench.is_quick else (64, 32, 1024)
    inputs = bench.randn(steps, lanes, width)
    for module in (nn.LSTMCell(width, width), LinearCell(width)):
        module.to(bench.device)
        for is_batched in (False, True):
            options = {"strategy": "uniform:16", "time_batching": is_batched}
            run_window(module, mse, inputs, inputs, None, **options)
            launched, fused = _launched(bench, module, inputs, options)
            what = f"{type(module).__name__}, time batching {is_batched}"
            per_step = {"kernels_per_step": launched / steps, "fused_per_step": fused / steps}
            yield info(what, **per_step)


def _launched(bench: Bench, module: Any, inputs: Any, options: dict[str, Any]) -> tuple[int, int]:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiled:
        run_window(module, mse, inputs, inputs, None, **options)
        bench.wait()
    events = profiled.key_averages()
    on_device = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    fused = [e for e in events if e not in on_device and "fused_lstm_cell" in e.key]
    return sum(e.count for e in on_device), sum(e.count for e in fused)
