"""Which device a run uses, and in which arithmetic."""

from __future__ import annotations

import os

import torch

from tbptt_ckpt.devices import accelerator, check_usable
from tbptt_ckpt.errors import ArgumentError

# Autocast keeps the weights in float32, so what is trained and saved is float32.
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.float32}


def find_device(name: str | None) -> torch.device:
    """The device of that name, which this machine must have; None is the accelerator or the CPU.

    Whatever the name, it is one that can be used.
    """
    here = accelerator()
    if name is None:
        return here or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ArgumentError(f"--device {name} is no device; write cpu, cuda or cuda:1") from error
    if device.type == "cpu":
        return torch.device("cpu")
    check_usable(f"--device {name}: tensors", device)
    if here is None or here.type != device.type:
        present = "cpu" if here is None else f"cpu and {here.type}"
        raise ArgumentError(f"--device {name} is not on this machine, which has {present}")
    count = torch.accelerator.device_count()
    if device.index is not None and device.index >= count:
        raise ArgumentError(f"--device {name} does not exist: there are {count} {device.type}")
    return device


def autocast_dtype(dtype: str) -> torch.dtype | None:
    """What products are computed in where that is not the weights' own dtype."""
    return torch.bfloat16 if dtype == "bfloat16" else None


def ask_for_equal_bits(device: torch.device) -> None:
    """Have the device's libraries give the same bits in every run; the CPU gives them anyway.

    For the rest of the process, before anything runs there. Every command asks for it, since the
    kernels that are chosen then have other workspaces and take other times.
    """
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product
        torch.backends.cudnn.deterministic = True
