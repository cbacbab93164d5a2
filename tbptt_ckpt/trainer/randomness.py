"""The global random generators: Python's, numpy's, torch's on the CPU and on devices in use."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tbptt_ckpt.devices import accelerators, default_generators


def random_state(tensors: Iterable[Tensor]) -> dict[str, Any]:
    """Where they stand, in numbers, strings and tensors; the devices are those of `tensors`."""
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 - the global one
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    used = list(tensors)
    if devices := accelerators(used):
        states = [each.get_state() for each in default_generators(used)]
        state["accelerator"] = [devices[0].type, states]
    return state


def set_random_state(state: dict[str, Any], tensors: Iterable[Tensor]) -> None:
    """Put them back; those of devices of another kind than here are left out.

    The devices are again those of `tensors`, in the same order, and may be others than before.
    """
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    used = list(tensors)
    kind, states = state.get("accelerator", (None, []))
    if any(device.type == kind for device in accelerators(used)):
        for generator, device_state in zip(default_generators(used), states, strict=False):
            generator.set_state(device_state)
