"""Host memory that the process's allocator has handed out, tensors on the CPU included."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable


def malloc_bytes() -> int | None:
    """Bytes in use, over all threads; None where the C library does not say.

    Resident memory would not do: in a warm process an allocation mostly finds pages that
    are resident already.
    """
    function = _mallinfo()
    if function is None:
        return None
    info = function()
    return int(info.in_use + info.mapped)


class _MallInfo(ctypes.Structure):
    """`struct mallinfo2` of glibc 2.33 and later."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "num_free", "num_small", "num_mapped", "mapped"),
            *("unused", "free_small", "in_use", "free", "releasable"),
        )
    )


@functools.cache
def _mallinfo() -> Callable[[], _MallInfo] | None:
    if sys.platform != "linux":
        return None
    try:
        function = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError):
        return None
    function.restype, function.argtypes = _MallInfo, []
    return function
