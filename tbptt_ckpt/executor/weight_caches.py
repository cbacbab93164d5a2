"""Weights that torch keeps in another form are kept within one run only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from tbptt_ckpt.devices import device_of
from tbptt_ckpt.module.trees import Tree, iterate_tensors


def autocast_of(
    dtype: torch.dtype | None, weights: Sequence[Tensor], example: Tree
) -> AbstractContextManager[None] | None:
    """Autocast as the user wants it, whoever turned it on; None where nobody did.

    It is that of the device of the weights; of a function's, that of what it is given.
    """
    types = (t.device.type for t in iterate_tensors(example))
    other = next((kind for kind in types if kind != "cpu"), "cpu")
    device_type = device_of(weights).type if weights else other
    if dtype is not None:
        return uncached_autocast(torch.autocast(device_type, dtype=dtype))
    return uncached_autocast(nullcontext()) if torch.is_autocast_enabled(device_type) else None


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
