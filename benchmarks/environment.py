"""Where a figure was measured: versions and machine, without names of hosts or users."""

from __future__ import annotations

import contextlib
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import psutil
import torch


def describe_environment(*further: str) -> dict[str, object]:
    """Versions, processor, cores and threads in use, and how busy the machine was.

    Args:
        further: Distributions whose versions matter too; absent ones are left out.
    """
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "tbptt_ckpt": version("tbptt-ckpt"),
        "torch": torch.__version__,
        "numpy": np.__version__,
        **installed_versions(*further),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "accelerator": _accelerator(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def installed_versions(*distributions: str) -> dict[str, object]:
    """Versions of those distributions that are installed."""
    found: dict[str, object] = {}
    for name in distributions:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")


def _accelerator() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return "none"
