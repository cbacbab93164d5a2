"""Where a figure was measured: versions and machine, without names of hosts or users."""

from __future__ import annotations

import os
import platform
import sys
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from tbptt_ckpt.devices import accelerator
from tbptt_ckpt.snapshot.writing import library_versions


def describe_environment(*further: str) -> dict[str, Any]:
    """Versions, also of `further` distributions that are installed, machine and its load."""
    installed, here = {}, accelerator()
    for name in further:
        with suppress(PackageNotFoundError):
            installed[name] = version(name)
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **library_versions(),
        **installed,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "accelerator": "none" if here is None else torch.get_device_module(here).get_device_name(),
        "load_average": round(psutil.getloadavg()[0], 2),
    }


def _processor() -> str:
    unnamed = platform.processor() or "unknown"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return unnamed
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, unnamed)
