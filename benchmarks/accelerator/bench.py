"""The device that is looked at, how large the work may be, and the time that is left."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MIB = 2**20


@dataclass(frozen=True)
class Sizes:
    """Of one run of a section.

    Attributes:
        width: Features of inputs and state.
        num_lanes: Sequences side by side.
        num_steps: Steps of a window.
    """

    width: int
    num_lanes: int
    num_steps: int

    def __str__(self) -> str:
        return f"{self.num_lanes} x {self.width}, {self.num_steps:,} steps"


@dataclass(frozen=True)
class Peaks:
    """Most bytes since the last `fresh`, as the allocator counts them."""

    allocated: int
    requested: int
    reserved: int


class Bench:
    """What every section is given.

    Args:
        device: Where modules run.
        is_quick: Tiny sizes: to see that it works.
        seconds: For all sections together.
    """

    def __init__(self, device: torch.device, *, is_quick: bool, seconds: float) -> None:
        self.device, self.is_quick = device, is_quick
        self._ends = time.perf_counter() + seconds

    @property
    def is_accelerator(self) -> bool:
        return self.device.type != "cpu"

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def seconds_left(self) -> float:
        return self._ends - time.perf_counter()

    def sizes(self, *large: Sizes) -> tuple[Sizes, ...]:
        """These, or one that tells nothing of speed."""
        return (Sizes(16, 2, 64),) if self.is_quick else large

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The same numbers on every device."""
        generator = torch.Generator().manual_seed(len(shape))
        return torch.randn(*shape, generator=generator, dtype=dtype).to(self.device)

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.is_accelerator:
            torch.accelerator.synchronize(self.device)

    def fresh(self) -> int:
        """Forget what is not used any more; bytes that still are."""
        gc.collect()
        if not self.is_accelerator:
            return 0
        self.wait()
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats(self.device)
        return torch.accelerator.memory_allocated(self.device)

    def peaks(self) -> Peaks:
        """Since the last `fresh`; on accelerators only."""
        statistics = torch.accelerator.memory_stats(self.device)
        kinds = ("allocated", "requested", "reserved")
        return Peaks(*(statistics.get(f"{kind}_bytes.all.peak", 0) for kind in kinds))

    def warm(self) -> None:
        """Have libraries take their workspaces, so that these are in no figure."""
        square = self.randn(64, 64).requires_grad_()
        (square @ square).sum().backward()
        lstm = torch.nn.LSTM(8, 8).to(self.device)
        lstm(self.randn(2, 2, 8))[0].sum().backward()
        self.wait()

    @property
    def can_be_limited(self) -> bool:
        """Whether a process can be given a part of the device's memory."""
        return self.is_accelerator and hasattr(self.module, "set_per_process_memory_fraction")

    @contextlib.contextmanager
    def limited_to(self, num_bytes: int) -> Iterator[None]:
        """No more than so many bytes of the device within."""
        total = torch.accelerator.get_memory_info(self.device)[1]
        self.fresh()
        self.module.set_per_process_memory_fraction(min(1.0, num_bytes / total))
        try:
            yield
        finally:
            self.module.set_per_process_memory_fraction(1.0)
            self.fresh()

    @property
    def module(self) -> Any:
        """What torch has for devices of this kind."""
        return torch.get_device_module(self.device)


def mib(num_bytes: float | None) -> float | None:
    """In MiB, for those who read."""
    return None if num_bytes is None else round(num_bytes / MIB, 2)
