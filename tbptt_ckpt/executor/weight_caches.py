"""Weights that torch keeps in another form are kept within one run only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.nn.utils import parametrize


@contextmanager
def uncached_autocast(autocast: AbstractContextManager[Any]) -> Iterator[None]:
    """Autocast without its weight cache from run to run.

    A cast weight that was cached without a graph, or with one that is freed by now, would
    cut the weight off from its gradient.
    """
    torch.clear_autocast_cache()
    with autocast:
        yield
    torch.clear_autocast_cache()


@contextmanager
def without_cached_weights() -> Iterator[None]:
    """`parametrize.cached()` within one run only, for the same reason."""
    parametrize._cache.clear()
    yield
    parametrize._cache.clear()
