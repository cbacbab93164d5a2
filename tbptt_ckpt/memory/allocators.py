"""Who tells meters about changes: one source per thread on the CPU, one per accelerator.

Meters may nest and may end in any order: a source hands every change to all that listen.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from tbptt_ckpt.errors import TbpttError
from tbptt_ckpt.memory.libraries import make_workspaces
from tbptt_ckpt.memory.recorders import (
    Events,
    Recorder,
    make_known,
    new_recorder,
    profiler_is_active,
)
from tbptt_ckpt.memory.storages import distinct_storages, live_storages


class CachePeaks(NamedTuple):
    """Peaks of a caching allocator since it was read before, of the whole process."""

    reserved_bytes: int | None = None
    requested_bytes: int | None = None


NO_CACHE = CachePeaks()

# Takes in changes, in order.
Listener = Callable[[Events, CachePeaks], None]


class CpuSource:
    """Changes made by the CPU allocator for one thread."""

    def __init__(self) -> None:
        self._listeners: list[Listener] = []
        self._thread = threading.get_ident()
        self._recorder: Recorder

    @property
    def is_recording(self) -> bool:
        """Whether somebody listens."""
        return bool(self._listeners)

    def attach(self, listener: Listener, held: object) -> None:
        """Report everything from now on; `held` as for `peak_memory`."""
        older = live_storages() if held is None else distinct_storages(held, grads=True)
        if self._listeners:
            self.drain()
        else:
            if profiler_is_active():
                raise TbpttError(
                    "peak_memory() cannot start: a torch profiler is active on this thread, and "
                    "torch allows only one; leave its region first, or measure outside of it"
                )
            self._recorder = new_recorder()
            self._recorder.start()
        entered = make_known(older)
        seconds, deltas = self._recorder.drain()
        # What was entered is no allocation. It is taken off first, so that listeners
        # from before see a dip and never a spike.
        self._report((np.append(time.time(), seconds), np.append(-entered, deltas)))
        self._listeners.append(listener)

    def detach(self, listener: Listener) -> None:
        """Report everything up to now, and nothing more."""
        if listener not in self._listeners:
            return  # a fork's copy of a region: its source was silenced
        if threading.get_ident() != self._thread:
            raise TbpttError("peak_memory() was left on another thread than it was entered on")
        last = len(self._listeners) == 1
        try:
            self._report(self._recorder.stop() if last else self._recorder.drain())
        finally:
            self._listeners.remove(listener)

    def drain(self) -> None:
        """Report everything up to now."""
        if not self._listeners:
            return
        try:
            events = self._recorder.drain()
        except RuntimeError as error:
            raise TbpttError(
                "flush() has to be called on the thread that entered peak_memory(), "
                "or inside the backward pass that thread started"
            ) from error
        self._report(events)

    def retries(self) -> int | None:
        """The CPU allocator has no cache."""
        return None

    def silence(self) -> None:
        """Stop recording and forget all listeners."""
        if self._listeners:
            self._listeners.clear()
            self._recorder.stop()

    def _report(self, events: Events) -> None:
        for listener in self._listeners:
            listener(events, NO_CACHE)


class AcceleratorSource:
    """Changes of an accelerator's allocator, from its own statistics.

    Those are the process's, all threads together. Reading resets the peaks among them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._listeners: list[Listener] = []
        self._lock = threading.RLock()
        self._live = 0
        self._retries: int | None = None

    def attach(self, listener: Listener, held: object) -> None:
        """Report everything from now on; the allocator counts every free by itself."""
        make_workspaces(self._device)
        with self._lock:
            self.drain()
            self._listeners.append(listener)

    def detach(self, listener: Listener) -> None:
        """Report everything up to now, and nothing more."""
        with self._lock:
            self.drain()
            self._listeners.remove(listener)

    def drain(self) -> None:
        """Report everything up to now as a rise to the peak and a fall to what is live."""
        with self._lock:
            # Read once: gathering all of them takes most of the time of a reading.
            statistics = torch.accelerator.memory_stats(self._device)
            torch.accelerator.reset_peak_memory_stats(self._device)
            peak = statistics.get("allocated_bytes.all.peak", 0)  # none before a first allocation
            live = statistics.get("allocated_bytes.all.current", 0)
            cache = CachePeaks(
                statistics.get("reserved_bytes.all.peak", 0),
                statistics.get("requested_bytes.all.peak"),
            )
            self._retries = statistics.get("num_alloc_retries")
            deltas = np.array([peak - self._live, live - peak], np.int64)
            self._live = live
            for listener in self._listeners:
                listener((np.full(2, time.time()), deltas), cache)

    def retries(self) -> int | None:
        """How often the allocator had freed its cache and tried again, by the last reading."""
        return self._retries


class _ThisThread(threading.local):
    def __init__(self) -> None:
        self.source = CpuSource()


Source = CpuSource | AcceleratorSource
_this_thread = _ThisThread()
accelerator_source = functools.cache(AcceleratorSource)


def cpu_source() -> CpuSource:
    """The calling thread's source."""
    return _this_thread.source


# A data loader's worker forked inside a region would record for ever, unread.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: cpu_source().silence())
