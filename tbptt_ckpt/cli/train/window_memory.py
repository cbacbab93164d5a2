"""What one window of a run takes in tensor memory, recomputed as planned and retained."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count

import torch
from torch import nn

from tbptt_ckpt import TensorSequence
from tbptt_ckpt.cli.bytes.contract import initial_state
from tbptt_ckpt.cli.bytes.corpus import ByteLanes
from tbptt_ckpt.cli.train.config import TrainingConfig
from tbptt_ckpt.cli.train.engine import build_engine
from tbptt_ckpt.memory.available import free_memory
from tbptt_ckpt.memory.meter import PeakMeter, peak_memory
from tbptt_ckpt.memory.storages import live_storages, tensor_bytes
from tbptt_ckpt.module.ambient import untouched
from tbptt_ckpt.schedule.windows import Window, WindowSequence

# Windows retained to predict what a longer one would take, so that measuring it is safe.
_PROBE_STEPS = (32, 64)
# Longer windows are not retained: the graph of every step takes host memory as well.
_MOST_RETAINED_STEPS = 1_024
_FREE_FRACTION = 0.5
_CALLS_PER_FLUSH = 64


@dataclass(frozen=True, slots=True)
class RetainedPeak:
    """Peak tensor bytes of a window with everything retained.

    Attributes:
        peak_bytes: Weights, gradients and optimizer state included; None where the module
            cannot be copied, as with tensors that have a graph among its attributes.
        measured: False where running it was not safe and two shorter windows were
            extrapolated instead.
    """

    peak_bytes: int | None
    measured: bool


def fullest_window(windows: WindowSequence) -> int:
    """Index of the first window that runs the most steps, a warm one where there is a choice.

    Before the third window the optimizer's state may be missing and allocators are cold.
    """
    if windows.k2 is None:
        return len(windows) - 1
    grown = -(-windows.k2 // windows.k1) + 3  # windows grow until they reach back k2 steps
    indices = range(min(len(windows), grown))
    return max(indices, key=lambda i: (_num_steps(windows[i]), i >= 2, -i))


def _num_steps(window: Window) -> int:
    return window.stop - window.first


def live_bytes(device: torch.device) -> int:
    """Bytes of all tensors on the device."""
    if device.type != "cpu":
        return torch.accelerator.memory_allocated(device)
    return sum(storage.nbytes() for storage in live_storages() if storage.device == device)


@contextmanager
def metered(device: torch.device, module: nn.Module) -> Iterator[PeakMeter]:
    """`peak_memory` that reads its records while the module runs, so that they stay few."""
    calls = count(1)
    with peak_memory(device, rss=False) as meter:

        def flush(*_: object) -> None:
            if next(calls) % _CALLS_PER_FLUSH == 0:
                meter.flush()

        hook = module.register_forward_pre_hook(flush)
        try:
            yield meter
        finally:
            hook.remove()


def retained_peak(
    config: TrainingConfig,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    source: ByteLanes,
    window: Window,
) -> RetainedPeak:
    """Peak of the same window, loss and update with everything retained.

    It runs on copies of module and optimizer; what is trained stays as it is.
    """
    steps = _num_steps(window)
    try:
        copy.deepcopy((module, optimizer))
    except Exception:  # whatever the user's own __deepcopy__ raises
        return RetainedPeak(None, measured=False)

    def measure(num_steps: int) -> int:
        return _measure(config, module, optimizer, source, window, num_steps)

    if steps <= _PROBE_STEPS[-1]:
        return RetainedPeak(measure(steps), measured=True)
    short, longer = (measure(num_steps) for num_steps in _PROBE_STEPS)
    per_step = (longer - short) / (_PROBE_STEPS[1] - _PROBE_STEPS[0])
    predicted = round(longer + per_step * (steps - _PROBE_STEPS[1]))
    if steps > _MOST_RETAINED_STEPS or predicted > _FREE_FRACTION * free_memory(source.device):
        return RetainedPeak(predicted, measured=False)
    return RetainedPeak(measure(steps), measured=True)


def _measure(
    config: TrainingConfig,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    source: ByteLanes,
    window: Window,
    num_steps: int,
) -> int:
    """Peak of the window's last `num_steps` steps, all its proportions kept."""
    share = num_steps / _num_steps(window)
    new_steps = max(1, round((window.stop - window.new_start) * share))
    reach = max(1, round((window.stop - window.start) * share))
    module, optimizer = copy.deepcopy((module, optimizer))
    config = replace(
        config, k1=num_steps, k2=reach, strategy="retain", executor="replay", budget=None
    )
    engine = build_engine(config, module, optimizer)
    inputs, targets = source.read(window.stop - num_steps, window.stop)
    weight = (torch.arange(num_steps) >= num_steps - new_steps).float()
    sequence = TensorSequence(inputs, targets, weight=weight)
    with untouched(module):
        state = initial_state(module, source.lanes)
        live = tensor_bytes(module, optimizer, inputs, targets, state, grads=True)
        with metered(source.device, module) as meter:
            for _ in engine.windows(sequence, state):
                pass
    return live + meter.peak_bytes
