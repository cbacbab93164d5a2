"""Hooks that a module registers in its forward belong to the run that is differentiated."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

_SILENCED = ("register_hook", "register_post_accumulate_grad_hook", "retain_grad")
_lock = threading.Lock()
_patches = 0
_originals: dict[str, Callable[..., Any]] = {}
_thread = threading.local()


class SilenceableHooks:
    """While entered, `silent_hooks` has an effect.

    Kept apart from `silent_hooks`, which is entered once per advance: the methods of
    `torch.Tensor` are replaced at the first one and put back here, since that is not cheap.
    It also makes the interpreter forget what it knew of every other method of tensors.
    """

    __slots__ = ("_outer",)

    def __enter__(self) -> None:
        self._outer = getattr(_thread, "patched", None)
        _thread.patched = False

    def __exit__(self, *_: object) -> None:
        if _thread.patched:
            _change_patches(-1)
        _thread.patched = self._outer


@contextmanager
def silent_hooks() -> Iterator[None]:
    """Registering a hook on a tensor does nothing in this thread.

    An advance has no gradients: a hook registered in it would raise, or, on a weight, be
    registered once more by the replay.
    """
    if getattr(_thread, "patched", None) is False:
        _change_patches(+1)
        _thread.patched = True
    before, _thread.silent = getattr(_thread, "silent", False), True
    try:
        yield
    finally:
        _thread.silent = before


def _change_patches(change: int) -> None:
    global _patches  # one count for the process: `torch.Tensor` is shared by its threads
    with _lock:
        if _patches == 0:
            for name in _SILENCED:
                _originals[name] = getattr(torch.Tensor, name)
                setattr(torch.Tensor, name, _silenceable(_originals[name]))
        _patches += change
        if _patches == 0:
            for name in _SILENCED:
                setattr(torch.Tensor, name, _originals[name])


def _silenceable(original: Callable[..., Any]) -> Callable[..., Any]:
    def register(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if getattr(_thread, "silent", False):
            return RemovableHandle(OrderedDict())  # a handle of no hook
        return original(tensor, *args, **kwargs)

    return register
