"""The random generators of the whole process: Python's, numpy's, torch's on every device."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """The state of every global generator, in numbers, strings and tensors."""
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 - the global one
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    here = torch.accelerator.current_accelerator(check_available=True)
    if here is not None:
        states = torch.get_device_module(here).get_rng_state_all()
        state["accelerator"] = [here.type, list(states)]
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put every generator back; those of devices that are not here are left out."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    here = torch.accelerator.current_accelerator(check_available=True)
    kind, states = state.get("accelerator", (None, []))
    if here is not None and kind == here.type:
        module = torch.get_device_module(here)
        for index, device_state in enumerate(states[: torch.accelerator.device_count()]):
            module.set_rng_state(device_state, index)
