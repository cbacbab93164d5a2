"""The peak of tensor memory over a region of code."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from tbptt_ckpt.arguments import checked
from tbptt_ckpt.errors import TbpttError
from tbptt_ckpt.memory.allocators import CachePeaks, Source, accelerator_source, cpu_source
from tbptt_ckpt.memory.available import Device, accelerator_or_cpu
from tbptt_ckpt.memory.recorders import Events, profiler_is_active
from tbptt_ckpt.memory.resident import RssSampler

_KEPT_POINTS = 4096


@checked
def peak_memory(
    device: Device | None = None, *, held: object = None, rss: bool = True
) -> PeakMeter:
    """Measure the peak of tensor memory over a region.

    CPU: exact to the byte, for everything the tensor allocator hands out to this thread
    and to the backward passes it starts, inside fused kernels too. Libraries' own scratch
    memory (MKL, oneDNN) and Python objects are not tensor memory; the resident memory
    measured beside it has them. Costs some 2 us for each allocation with its free, which is
    a few percent of the time of a loop over cells of width 256 and up to half for tiny
    ones, and up to 0.9 KiB of host memory for each of the two until `flush()` is called.
    Accelerators: the allocator's own statistics, read at both ends and at every `flush()`,
    some 0.1 ms each; nothing waits for the device. They are counted for the whole process,
    and the allocator's peak statistics are reset.

    Regions may nest. On the CPU torch allows one profiler for a thread, so a region
    cannot start inside a `torch.profiler` region, nor the other way round.

    Args:
        device: What to measure; None is the CPU.
        held: Trees of tensors, modules and optimizers that are live at entry and may be
            freed inside. Frees of tensors from before count only where they are named
            here (gradients of named tensors included); None looks for all of them, some
            10 ms for each 100,000 objects of the process. Accelerators need no naming.
        rss: Whether to sample the process's resident memory beside it.

    Raises:
        ArgumentError: A device that this machine does not have.
        TbpttError: On entry, where another profiler is active on this thread.

    Example:
        >>> with peak_memory() as memory:
        ...     loss = model(inputs).sum()
        ...     loss.backward()
        >>> format_bytes(memory.peak_bytes)
    """
    where = accelerator_or_cpu(device)
    source: Source = cpu_source() if where.type == "cpu" else accelerator_source(where)
    return PeakMeter(source, held, RssSampler() if rss else None)


@checked
def can_measure(device: Device | None = None) -> bool:
    """Whether `peak_memory(device)` could start here: no other profiler is in its way."""
    if accelerator_or_cpu(device).type != "cpu":
        return True
    return cpu_source().is_recording or not profiler_is_active()


@dataclass(frozen=True, slots=True)
class Lap:
    """A stretch of a region; bytes are above those at the region's entry.

    Attributes:
        peak_bytes: Highest live bytes in the stretch, those it began with included.
        now_bytes: Live bytes at its end.
    """

    peak_bytes: int
    now_bytes: int


class PeakMeter:
    """A region being measured, and afterwards its result; made by `peak_memory`.

    Inside the region the attributes are as of the last `flush()`.

    Attributes:
        reserved_peak_bytes: Highest total of an accelerator's memory that its allocator
            has taken from the driver, unused blocks included; None on the CPU.
        requested_peak_bytes: Highest total of what tensors of the process asked for: allocated
            without what its allocator rounds up, which depends on what ran before. None on the
            CPU, where that is `peak_bytes`, and where an allocator does not say.
        allocation_retries: How often the accelerator's allocator had to give its cache
            back and try again; None where it does not say.
    """

    def __init__(self, source: Source, held: object, rss: RssSampler | None) -> None:
        self._source, self._held, self._rss = source, held, rss
        self._live = _LiveBytes()
        self._started = time.time()
        self._state: Literal["new", "open", "closed"] = "new"
        self.reserved_peak_bytes: int | None = None
        self.requested_peak_bytes: int | None = None
        self.allocation_retries: int | None = None

    @property
    def peak_bytes(self) -> int:
        """Highest live bytes above those at entry; 0 if it never rose above them."""
        return self._live.peak_bytes

    @property
    def net_bytes(self) -> int:
        """Bytes allocated minus bytes freed; negative if older tensors were freed."""
        return self._live.now_bytes

    @property
    def timeline(self) -> list[tuple[float, int]]:
        """(seconds since entry, live bytes above those at entry), some 8,000 at most.

        Thinned to the highest and lowest of short stretches; the peak is in it exactly.
        On accelerators there is a peak and an end for every stretch between flushes.
        """
        return self._live.points()

    @property
    def rss_peak_bytes(self) -> int | None:
        """Highest resident memory of the process, all of it; None if not asked for."""
        return self._rss.peak_bytes if self._rss else None

    @property
    def rss_source(self) -> Literal["VmHWM", "sampled"] | None:
        """Where `rss_peak_bytes` is from: the kernel's exact mark, or samples."""
        return self._rss.source if self._rss else None

    def __enter__(self) -> Self:
        if self._state != "new":
            raise TbpttError("a meter measures one region; call peak_memory() for each")
        self._source.attach(self._observe, self._held)
        self._state, self._held = "open", None
        self._started = time.time()
        self._retries_before = self._source.retries()
        if self._rss:
            self._rss.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._state = "closed"
        try:
            self._source.detach(self._observe)
        finally:
            if self._rss:
                self._rss.__exit__()
        self._live.fold(np.array([time.time() - self._started]), np.zeros(1, np.int64))
        retries = self._source.retries()
        if retries is not None and self._retries_before is not None:
            self.allocation_retries = retries - self._retries_before

    def flush(self) -> None:
        """Take in what was recorded so far, drop the records, and go on.

        Call it between operations, on the thread of the region or in a hook of its
        backward pass. It changes no result; it only keeps the meter small.
        """
        if self._state == "open":
            self._source.drain()

    def lap(self) -> Lap:
        """Flush, and say what happened since the last lap or the region's start."""
        self.flush()
        return Lap(self._live.take_lap(), self._live.now_bytes)

    def _observe(self, events: Events, cache: CachePeaks) -> None:
        seconds, deltas = events
        self._live.fold(seconds - self._started, deltas)
        self.reserved_peak_bytes = _higher(self.reserved_peak_bytes, cache.reserved_bytes)
        self.requested_peak_bytes = _higher(self.requested_peak_bytes, cache.requested_bytes)


def _higher(known: int | None, found: int | None) -> int | None:
    return known if found is None else max(known or 0, found)


class _LiveBytes:
    """Live bytes above those at the start of a region: now, at the most, and a thinned record."""

    def __init__(self) -> None:
        self.now_bytes = 0
        self.peak_bytes = 0
        self._lap_peak_bytes = 0
        self._seconds: NDArray[np.float64] = np.zeros(1)
        self._live: NDArray[np.int64] = np.zeros(1, np.int64)

    def fold(self, seconds: NDArray[np.float64], deltas: NDArray[np.int64]) -> None:
        """Add changes in the order they happened, `deltas` bytes at `seconds`."""
        if not deltas.size:
            return
        live = self.now_bytes + np.cumsum(deltas)
        self.now_bytes = int(live[-1])
        highest = int(live.max())
        self.peak_bytes = max(self.peak_bytes, highest)
        self._lap_peak_bytes = max(self._lap_peak_bytes, highest)
        thinned_seconds, thinned = _thin(seconds, live)
        self._seconds = np.concatenate([self._seconds, thinned_seconds])
        self._live = np.concatenate([self._live, thinned])
        if self._live.size > 2 * _KEPT_POINTS:
            self._seconds, self._live = _thin(self._seconds, self._live)

    def take_lap(self) -> int:
        """The highest value since the last lap, the value it began with included."""
        peak, self._lap_peak_bytes = self._lap_peak_bytes, self.now_bytes
        return peak

    def points(self) -> list[tuple[float, int]]:
        """(seconds, live bytes), thinned; the peak and both ends are always among them."""
        return list(zip(self._seconds.tolist(), self._live.tolist(), strict=True))


def _thin(
    seconds: NDArray[np.float64], live: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """At most about `_KEPT_POINTS` of the points: highest and lowest of equal stretches.

    The highest point of all is the highest of its stretch, so it survives every thinning.
    """
    size = -(-live.size // (_KEPT_POINTS // 2))
    if size <= 2:
        return seconds, live
    stretches = np.pad(live, (0, -live.size % size), mode="edge").reshape(-1, size)
    starts = np.arange(len(stretches)) * size
    picks = np.concatenate([[0], starts + stretches.argmin(1), starts + stretches.argmax(1)])
    kept = np.union1d(np.minimum(picks, live.size - 1), live.size - 1)
    return seconds[kept], live[kept]
