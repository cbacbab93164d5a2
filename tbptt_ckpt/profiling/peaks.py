"""Peaks of tensor memory: of whatever runs a module, and of a window with everything retained."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from tbptt_ckpt.data.tensors import TensorSequence
from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.memory.available import free_memory
from tbptt_ckpt.memory.exhausted import is_out_of_memory, release_memory
from tbptt_ckpt.memory.meter import peak_memory
from tbptt_ckpt.memory.reading import reading
from tbptt_ckpt.memory.storages import live_storages
from tbptt_ckpt.module.ambient import untouched
from tbptt_ckpt.profiling.workload import Workload
from tbptt_ckpt.schedule.windows import Window, WindowSequence

# Windows retained to predict what a longer one would take, so that measuring it is safe.
_PROBE_STEPS = (32, 64)
# Longer windows are not retained: the graph of every step takes host memory as well.
_MOST_RETAINED_STEPS = 1_024
_FREE_FRACTION = 0.5

T = TypeVar("T")


def metered(work: Workload, act: Callable[[], T]) -> tuple[T, int]:
    """What `act` returns, and the peak of all tensor bytes on the work's device meanwhile."""
    device = work.device
    with peak_memory(device, rss=False) as meter, reading(meter.flush):
        if device.type == "cpu":
            live = sum(storage.nbytes() for storage in live_storages() if storage.device == device)
        else:
            live = torch.accelerator.memory_allocated(device)
        result = act()
    return result, live + meter.peak_bytes


def fullest_window(windows: WindowSequence) -> int:
    """Index of the first window that runs the most steps, a warm one where there is a choice.

    Before the third window the optimizer's state may be missing and allocators are cold.
    """
    if windows.k2 is None:
        return len(windows) - 1
    grown = -(-windows.k2 // windows.k1) + 3  # windows grow until they reach back k2 steps
    indices = range(min(len(windows), grown))
    return max(indices, key=lambda i: (windows[i].stop - windows[i].first, i >= 2, -i))


def retained_peak(work: Workload, window: Window) -> tuple[int | None, bool]:
    """Peak bytes of a window, its loss and update with everything retained, and if measured.

    It is run on copies, from the first state. The peak is None where the module cannot be
    copied, as with tensors that have a graph among its attributes, and where there is no memory
    for it; where running it was not safe, two shorter windows were extrapolated instead.
    """
    try:
        work.copied()
    except ArgumentError:
        return None, False
    try:
        return _retained_peak(work, window)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    release_memory()
    return None, False


def _retained_peak(work: Workload, window: Window) -> tuple[int, bool]:
    steps = window.stop - window.first
    if steps > _PROBE_STEPS[1]:
        short, longer = (_measure(work, window, num_steps) for num_steps in _PROBE_STEPS)
        per_step = (longer - short) / (_PROBE_STEPS[1] - _PROBE_STEPS[0])
        predicted = round(longer + per_step * (steps - _PROBE_STEPS[1]))
        if steps > _MOST_RETAINED_STEPS or predicted > _FREE_FRACTION * free_memory(work.device):
            return predicted, False
    return _measure(work, window, steps), True


def _measure(work: Workload, window: Window, num_steps: int) -> int:
    """Peak of the window's last `num_steps` steps, all its proportions kept."""
    share = num_steps / (window.stop - window.first)
    new_steps = max(1, round((window.stop - window.new_start) * share))
    reach = max(1, round((window.stop - window.start) * share))
    inputs, targets = work.source.read(window.stop - num_steps, window.stop)
    weight = (torch.arange(num_steps, device="cpu") >= num_steps - new_steps).float()
    mine = work.copied()
    engine = mine.engine(num_steps, reach, strategy="retain", measure_memory=True)
    with untouched(mine.module):
        time_dim = getattr(work.source, "time_dim", None)
        sequence = TensorSequence(inputs, targets, time_dim=time_dim, weight=weight)
        result = engine.train(sequence, mine.init_state)
    assert result.peak_bytes is not None, "it was measured"
    return result.peak_bytes
