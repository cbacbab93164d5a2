"""What a bug report needs: versions, machine, memory, and which extras are there."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import psutil
import torch
from rich.console import Console

from tbptt_ckpt.cli.terminal import figure_table
from tbptt_ckpt.devices import accelerator
from tbptt_ckpt.memory.available import free_memory
from tbptt_ckpt.memory.sizes import format_bytes
from tbptt_ckpt.profiling.environment import describe_environment

# What each extra brings, by the name under which it is imported.
_EXTRAS = {
    "cli": ("typer", "rich"),
    "plots": ("matplotlib",),
    "tensorboard": ("tensorboard",),
    "test": ("pytest", "xdist", "memray"),
}


def examined() -> dict[str, Any]:
    """All of it, as plain data; no names of hosts or users."""
    devices = [{"device": "cpu", "free_bytes": free_memory()}]
    here = accelerator()
    for index in range(torch.accelerator.device_count() if here else 0):
        device = f"{here}:{index}"
        devices.append({"device": device, "free_bytes": free_memory(device)})
    missing = {
        extra: [name for name in names if find_spec(name) is None]
        for extra, names in _EXTRAS.items()
    }
    memory = psutil.virtual_memory()
    return {
        **describe_environment("typer", "rich", "matplotlib", "tensorboard"),
        "cuda": torch.version.cuda or "not in this build of torch",
        "memory_available_bytes": memory.available,
        # Less than what is available, where a container's limit is nearer.
        "devices": devices,
        "missing_of_extras": missing,
    }


def print_examined(found: dict[str, Any]) -> None:
    """Print it as a table on the standard output."""
    rows = [
        (name.replace("_", " "), str(value))
        for name, value in found.items()
        if not isinstance(value, dict | list) and not name.endswith("_bytes")
    ]
    rows.append(("memory available", format_bytes(found["memory_available_bytes"])))
    for device in found["devices"]:
        rows.append((f"free on {device['device']}", format_bytes(device["free_bytes"])))
    for extra, missing in found["missing_of_extras"].items():
        rows.append((f"extra {extra}", f"missing: {', '.join(missing)}" if missing else "there"))
    Console(highlight=False).print(figure_table("tbptt-ckpt doctor", rows))
