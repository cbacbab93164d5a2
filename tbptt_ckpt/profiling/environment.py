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

import numpy as np
import psutil
import torch


def describe_environment(*further: str) -> dict[str, Any]:
    """Versions, also of `further` distributions that are installed, machine and its load."""
    installed = {}
    for name in further:
        with suppress(PackageNotFoundError):
            installed[name] = version(name)
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "tbptt_ckpt": version("tbptt-ckpt"),
        "torch": torch.__version__,
        "numpy": np.__version__,
        **installed,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
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
