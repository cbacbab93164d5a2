"""The CPU tensor allocator's allocations and frees, as a stream of signed byte counts.

Both recorders read the memory events of torch's profiler. The allocator emits one per
block, whoever asked for it, so blocks inside fused kernels and in the threads that
autograd hands work to are in the stream. Blocks of threads that the user started are not.

Two functions that torch's libraries export, and its Python modules do not, are found by their C++
names, which change with their signatures. Where one is missing, the rest does without.

NOTE [frees of older blocks]
The CPU allocator reports a free with the size it wrote into a table when the block was
allocated, and it reads and writes that table only while memory is being profiled. A block
from before is therefore freed without an event; worse, when an earlier profiled block had
the same address and was freed unobserved, its stale entry makes the free of the new block
report the old size. Both are cured by entering the true size of every older block before
the region begins. Without that, frees of older blocks mostly go unreported, and the peak
errs upwards.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch._C import _autograd
from torch._C._profiler import ProfilerConfig, ProfilerState, _ExperimentalConfig

_API: Any = _autograd  # its stubs lack half of what is used here

_REPORTER = "_ZN3c1025profiledCPUMemoryReporterEv"
_REPORT_NEW = "_ZN3c1025ProfiledCPUMemoryReporter3NewEPvm"
_HAS_CALLBACKS = "_ZN2at12hasCallbacksEv"

# Seconds since the epoch and signed bytes, in the order they happened.
Events = tuple[NDArray[np.float64], NDArray[np.int64]]


def profiler_is_active() -> bool:
    """Whether some torch profiler is recording on this thread; it allows only one."""
    return bool(_autograd._profiler_enabled())


class DrainingRecorder:
    """Records memory events alone, and reads them without a pause.

    This is torch's first profiler, the only one whose events can be taken out while it
    runs, inside a backward pass too. Memory events cost about 0.1 us each, 1.5 us to
    read, and up to 0.9 KiB until then. Its operator events, most of its cost, are not
    wanted: the callback that makes them is removed at once. That cannot be left to the
    profiler's end, since it forgets its callback at the first drain, and one left behind
    crashes the next profiler on the thread. Removing takes every callback there is, so
    this recorder is not for threads that have others.
    """

    def start(self) -> None:
        """Begin to record."""
        _API._enable_profiler_legacy(
            ProfilerConfig(
                ProfilerState.CPU, False, True, False, False, False, _ExperimentalConfig()
            )
        )
        self.drain()
        _API._clear_callbacks()

    def drain(self, *, end: bool = False) -> Events:
        """Events since the last call."""
        options = _API._ProfilerDisableOptions(end, True)
        per_thread = [_columns(events) for events in _API._disable_profiler_legacy(options)]
        seconds = np.concatenate([np.zeros(0), *(pair[0] for pair in per_thread)])
        deltas = np.concatenate([np.zeros(0, np.int64), *(pair[1] for pair in per_thread)])
        if len(per_thread) > 1:
            order = np.argsort(seconds, kind="stable")
            return seconds[order], deltas[order]
        return seconds, deltas

    def stop(self) -> Events:
        """As `drain`, and end recording."""
        return self.drain(end=True)


def _columns(events: list[Any]) -> Events:
    """The CPU memory events among one thread's events; all others have no CPU bytes."""
    deltas = np.fromiter((event.cpu_memory_usage() for event in events), np.int64, len(events))
    used = np.flatnonzero(deltas)
    micros = np.fromiter((events[i].start_us() for i in used), np.float64, len(used))
    return micros * 1e-6, deltas[used]


class KinetoRecorder:
    """The same through torch's public profiler, where the other cannot be used.

    Dearer, and writes lines to stderr. It has to stop to be read: an event between two
    reads is lost, so nothing may be allocated meanwhile, and inside a backward pass,
    where it cannot stop, it keeps its events.
    """

    def start(self) -> None:
        """Begin to record."""
        self._profile = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        )
        self._profile.start()

    def drain(self) -> Events:
        """Events since the last call."""
        if torch._C._current_graph_task_id() != -1:
            return np.zeros(0), np.zeros(0, np.int64)
        events = self.stop()
        self.start()
        return events

    def stop(self) -> Events:
        """As `drain`, and end recording."""
        self._profile.stop()
        results: Any = getattr(self._profile.profiler, "kineto_results", None)
        memory = [
            each
            for each in results.events()
            if each.name() == "[memory]" and each.device_type() == _autograd.DeviceType.CPU
        ]
        seconds = np.array([each.start_ns() * 1e-9 for each in memory], np.float64)
        order = np.argsort(seconds, kind="stable")
        return seconds[order], np.array([each.nbytes() for each in memory], np.int64)[order]


Recorder = DrainingRecorder | KinetoRecorder


def new_recorder() -> Recorder:
    """The cheapest recorder that works in this version of torch, on this thread, now."""
    names = ("_enable_profiler_legacy", "_disable_profiler_legacy", "_clear_callbacks")
    if all(hasattr(_autograd, name) for name in names) and not has_operator_callbacks():
        return DrainingRecorder()
    return KinetoRecorder()


def make_known(storages: Iterable[torch.UntypedStorage]) -> int:
    """Enter CPU storages into the allocator's table; returns the bytes entered.

    To be called while memory is being recorded. Each entered storage also emits an
    allocation event, which the caller has to discount.
    """
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    reporter = _load("c10", _REPORTER, pointer)
    enter = _load("c10", _REPORT_NEW, None, pointer, pointer, size)
    if reporter is None or enter is None:
        return 0
    total, address = 0, reporter()
    for storage in storages:
        if _from_cpu_allocator(storage):
            enter(address, storage.data_ptr(), storage.nbytes())
            total += storage.nbytes()
    return total


def has_operator_callbacks() -> bool:
    """Whether anything on this thread observes torch's operators, as far as torch says."""
    function = _load("torch_cpu", _HAS_CALLBACKS, ctypes.c_bool)
    return function is not None and bool(function())


@functools.cache
def _load(library: str, symbol: str, result: Any, *arguments: Any) -> Any:
    """A function of one of torch's libraries, or None."""
    suffix = {"linux": "so", "darwin": "dylib"}.get(sys.platform)
    path = Path(torch.__file__).parent / "lib" / f"lib{library}.{suffix}"
    try:
        function = ctypes.CDLL(str(path))[symbol]
    except (OSError, AttributeError):
        return None
    function.restype, function.argtypes = result, arguments
    return function


def _from_cpu_allocator(storage: torch.UntypedStorage) -> bool:
    """Whether the CPU allocator will free this storage; numpy's, shared and mapped ones not.

    An entry for memory that others free would stay behind as a stale one.
    """
    if storage.device.type != "cpu" or storage.nbytes() == 0:
        return False
    pinned = torch.accelerator.is_available() and storage.is_pinned()
    return storage.resizable() and not storage.is_shared() and not pinned
