"""What libraries hold of a device's memory: workspaces that they take once and keep."""

from __future__ import annotations

import threading

import torch
from torch.utils._python_dispatch import _disable_current_modes

from tbptt_ckpt.devices import HOST
from tbptt_ckpt.memory.storages import live_storages

_made: set[tuple[int, torch.device, int]] = set()  # by thread, device and stream


def make_workspaces(device: torch.device) -> None:
    """Have products of matrices take their workspaces now, forward and backward.

    cuBLAS has one for each thread and stream from torch's allocator, and keeps it: 32 MiB on
    Hopper. What is measured afterwards does not see it made.
    """
    if device.type in HOST:
        return
    in_use = getattr(torch.get_device_module(device), "is_initialized", lambda: False)
    if not in_use():
        return
    key = threading.get_ident(), device, torch.accelerator.current_stream(device).stream_id
    if key not in _made:
        multiply(device)
        _made.add(key)


def multiply(device: torch.device) -> None:
    """A small product and its gradient, whatever modes are entered."""
    with (
        torch._C.DisableTorchFunction(),
        _disable_current_modes(),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        factor = torch.ones(16, 16, device=device, requires_grad=True)
        torch.autograd.backward((factor @ factor).sum())


def library_bytes(device: torch.device) -> int:
    """Bytes that an accelerator's allocator has handed out and no tensor has; none on the CPU.

    They are workspaces, and what sizes were rounded up by. A graph that is alive counts too, as far
    as only C++ holds it. Takes some 10 ms for each 100,000 objects of the process.
    """
    if device.type in HOST:
        return 0
    make_workspaces(device)
    tensors = sum(storage.nbytes() for storage in live_storages() if storage.device == device)
    return max(0, torch.accelerator.memory_allocated(device) - tensors)
