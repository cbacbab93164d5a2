"""Host memory of this process: what the kernel counts, and what its allocator handed out."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple, Self

import psutil

from tbptt_ckpt.arguments import AboveZero, checked

_STATUS = Path("/proc/self/status")


class RssBytes(NamedTuple):
    """Resident bytes of a process.

    Attributes:
        total: Everything resident; shared memory is in it and in neither of the others.
        anonymous: Heaps and stacks: what a process needs and the kernel cannot drop.
        file_backed: Pages of mapped files, libraries and memory-mapped data; the kernel
            drops them when memory runs short.
    """

    total: int
    anonymous: int
    file_backed: int


def rss_bytes() -> RssBytes:
    """Resident bytes of this process now.

    Read from /proc where it exists; elsewhere only the total is known, and all of it is
    reported as anonymous.
    """
    status = _read_status()
    if not status:
        total = psutil.Process().memory_info().rss
        return RssBytes(total, total, 0)
    return RssBytes(status["VmRSS"], status["RssAnon"], status["RssFile"])


class RssSampler:
    """Context manager: the highest resident memory of this process over a region.

    A thread reads it every `interval_seconds`, at about 0.1 ms a reading. A spike shorter
    than that can be missed, except where it sets a record for the process: the kernel
    keeps that exactly (VmHWM), and `source` says which of the two `peak_bytes` is. The
    kernel's mark is only read, never reset, so other readers of it are undisturbed.

    Attributes:
        peak_bytes: Highest total resident memory.
        peak_anonymous_bytes: Highest anonymous resident memory among the samples.
        source: "VmHWM" if `peak_bytes` is the kernel's exact mark, else "sampled".
    """

    @checked
    def __init__(self, interval_seconds: AboveZero = 0.005) -> None:
        self.interval_seconds = interval_seconds
        self.peak_bytes = 0
        self.peak_anonymous_bytes = 0
        self.source: Literal["VmHWM", "sampled"] = "sampled"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rss-sampler", daemon=True)

    def __enter__(self) -> Self:
        self._mark_before = _read_status().get("VmHWM", 0)
        self.sample()
        with suppress(RuntimeError):  # there can be no thread any more: both ends are seen
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        self.sample()
        mark = _read_status().get("VmHWM", 0)
        if mark > self._mark_before:
            self.peak_bytes, self.source = max(mark, self.peak_bytes), "VmHWM"

    def sample(self) -> None:
        """Take one reading now."""
        now = rss_bytes()
        self.peak_bytes = max(self.peak_bytes, now.total)
        self.peak_anonymous_bytes = max(self.peak_anonymous_bytes, now.anonymous)

    def _run(self) -> None:
        while not self._stop.wait(self.interval_seconds):
            with suppress(MemoryError, RuntimeError, OSError):  # whoever needs it will say so
                self.sample()


def _read_status() -> dict[str, int]:
    """Memory lines of /proc/self/status in bytes; none where they do not exist."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":")[::2] for line in lines if line.endswith(" kB"))
    sizes = {key: int(text.split()[0]) * 1024 for key, text in pairs}
    return sizes if {"VmRSS", "VmHWM", "RssAnon", "RssFile"} <= sizes.keys() else {}


def malloc_bytes() -> int | None:
    """Bytes that the C library's allocator has handed out; None where it does not say.

    Resident memory would not do: in a warm process an allocation mostly finds pages that
    are resident already.
    """
    function = _mallinfo()
    if function is None:
        return None
    sizes = function().sizes
    return int(sizes[4] + sizes[7])  # in blocks of their own, and in the heap


class _MallInfo(ctypes.Structure):
    """`struct mallinfo2` of glibc 2.33 and later."""

    _fields_ = (("sizes", ctypes.c_size_t * 10),)


@functools.cache
def _mallinfo() -> Callable[[], _MallInfo] | None:
    try:
        function = ctypes.CDLL(None).mallinfo2
    except (OSError, TypeError, AttributeError):  # not Linux, or no such glibc
        return None
    function.restype, function.argtypes = _MallInfo, []
    return function
