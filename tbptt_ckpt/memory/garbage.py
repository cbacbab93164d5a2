"""Keep garbage from before a measurement out of it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


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
