"""Keep the garbage collector out of short measurements."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_garbage_freed() -> Iterator[None]:
    """While entered, nothing that was garbage before is freed, which would count as a free."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
