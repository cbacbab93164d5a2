"""Memory that has run out: how it shows, and what to let go of before another try."""

from __future__ import annotations

import ctypes
import errno
import gc
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from tbptt_ckpt.devices import accelerator

# Of torch's allocator, of C++, of oneDNN (which says "primitive descriptor" of what it cannot do
# at all), of drivers and their libraries. cuDNN calls "not supported" what finds no workspace, too.
_MESSAGES = re.compile(
    r"can't allocate memory|not enough memory|std::bad_alloc|bad allocation"
    r"|could not (create|execute) a primitive(?! desc)"
    r"|out[ _]?of[ _]?((device|host)[ _])?memory|MemoryAllocation\b|status_?memory_?error"
    r"|STATUS\w*_?ALLOC(ATION)?_?FAILED|CUFFT_ALLOC_FAILED"
    r"|CUDNN_STATUS_NOT_SUPPORTED\.|(GET|FIND) was unable to find an engine"
    r"|unable to find a valid cuDNN algorithm",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the host had no memory left.

    `torch.OutOfMemoryError` is that of an accelerator's allocator. What the CPU's says, a library
    (its handle or workspace) or a driver (`torch.AcceleratorError`) is known by its text.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _MESSAGES.search(str(error)) is not None


def release_memory() -> None:
    """Give back what nothing refers to any more.

    Call it outside of the `except` block: the traceback holds the failed call's tensors.
    """
    gc.collect()
    empty_cache()
    if sys.platform == "linux":
        with suppress(AttributeError):  # only glibc has it
            ctypes.CDLL(None).malloc_trim(0)


def empty_cache() -> None:
    """Give the driver back what an accelerator's allocator keeps for later requests."""
    if accelerator() is not None:
        torch.accelerator.empty_cache()


@contextmanager
def older_garbage_kept() -> Iterator[None]:
    """While entered, the collector frees nothing that was garbage before, only newer garbage.

    Tensors in circles that it frees inside a region would count as the region's frees. Costs
    nothing, unless someone else has frozen objects: then what is garbage is collected first.
    """
    if gc.get_freeze_count():
        gc.collect()
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
