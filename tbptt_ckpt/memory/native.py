"""Two functions that torch's libraries export and its Python modules do not.

Found by their C++ names, which change with their signatures: where one is missing, on
Windows or in some later version, its caller does without.

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

import torch

_REPORTER = "_ZN3c1025profiledCPUMemoryReporterEv"
_REPORT_NEW = "_ZN3c1025ProfiledCPUMemoryReporter3NewEPvm"
_HAS_CALLBACKS = "_ZN2at12hasCallbacksEv"


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
