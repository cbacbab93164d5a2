"""Accelerators that tensors are on: which of them can be used, and torch's generators there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from tbptt_ckpt.errors import ArgumentError

HOST = ("cpu", "meta")  # types of devices that are none
# Of a device's module in torch: where random numbers come from, and what memory is taken.
_NEEDED = ("default_generators", "memory_stats")


def accelerator() -> torch.device | None:
    """The machine's accelerator, if it has one that can be used."""
    here = torch.accelerator.current_accelerator(check_available=True)
    return here if here is not None and _is_usable(here) else None


def accelerators(tensors: Iterable[Tensor]) -> list[torch.device]:
    """Those that tensors are on, each once."""
    return list({t.device: None for t in tensors if t.device.type not in HOST})


def device_of(weights: Sequence[Tensor]) -> torch.device:
    """Where the weights are; the CPU where none are known."""
    return weights[0].device if weights else torch.device("cpu")


def check_on_one(asked: str, weights: Iterable[Tensor]) -> None:
    """Raise `ArgumentError` for weights on several devices, where something is measured on one."""
    places = sorted({str(weight.device) for weight in weights})
    if len(places) > 1:
        raise ArgumentError(
            f"{asked}: the weights are on {' and '.join(places)}, and bytes are measured on one "
            "device; move them to one, or use a fixed strategy, such as 'sqrt', without "
            "memory_budget and measure_memory"
        )


def check_usable(what: str, device: torch.device) -> None:
    """Raise `ArgumentError` for a device of which torch tells too little, such as "mps"."""
    if not _is_usable(device):
        raise ArgumentError(
            f"{what} cannot be on {device}: torch has no random generator of it that can be put "
            "back, or no statistics of its memory; use a device that has both (cpu, cuda, xpu)"
        )


def default_generators(tensors: Iterable[Tensor]) -> list[torch.Generator]:
    """Torch's own one for each accelerator that tensors are on.

    Raises:
        ArgumentError: An accelerator that cannot be used, or one whose stream is captured.
    """
    found = []
    for device in accelerators(tensors):
        check_usable("a tensor of module, state or data", device)
        check_not_captured(device)
        module: Any = torch.get_device_module(device)
        found.append(module.default_generators[device.index])
    return found


def torch_generators(tensors: Iterable[Tensor]) -> list[torch.Generator]:
    """The CPU's as well, which is the first."""
    return [torch.default_generator, *default_generators(tensors)]


def check_not_captured(device: torch.device) -> None:
    """Raise `ArgumentError` while a CUDA graph is captured: generators cannot be read then."""
    is_capturing = getattr(torch.get_device_module(device), "is_current_stream_capturing", None)
    if is_capturing is not None and is_capturing():
        raise ArgumentError(
            f"a graph of {device} is being captured, and windows cannot be part of it: they put "
            "random generators back, and read losses; run them outside of the capture"
        )


def _is_usable(device: torch.device) -> bool:
    module = getattr(torch, device.type, None)
    return device.type in HOST or all(hasattr(module, name) for name in _NEEDED)
