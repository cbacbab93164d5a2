"""Hooks that a module registers in its forward belong to the run that is differentiated."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from tbptt_ckpt.module.replaced import ReplacedFunctions


class SilenceableHooks:
    """While entered, `silent_hooks` has an effect.

    That is entered once per advance; the methods of `torch.Tensor` are replaced at the first
    one and put back here, since the interpreter then forgets what it knew of all the others.
    """

    __slots__ = ("_outer",)

    def __enter__(self) -> None:
        self._outer = _thread.patched
        _thread.patched = False

    def __exit__(self, *_: object) -> None:
        if _thread.patched:
            _methods.close()
        _thread.patched = self._outer


@contextmanager
def silent_hooks() -> Iterator[None]:
    """Registering a hook on a tensor does nothing in this thread.

    An advance has no gradients: a hook registered in it would raise, or, on a weight, be
    registered once more by the replay.
    """
    if _thread.patched is False:
        _methods.open()
        _thread.patched = True
    before, _thread.silent = _thread.silent, True
    try:
        yield
    finally:
        _thread.silent = before


class _Thread(threading.local):
    patched: bool | None = None  # None outside of `SilenceableHooks`
    silent = False


def _silenceable(original: Callable[..., Any]) -> Callable[..., Any]:
    def register(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if _thread.silent:
            return RemovableHandle(OrderedDict())  # a handle of no hook
        return original(tensor, *args, **kwargs)

    return register


_thread = _Thread()
_methods = ReplacedFunctions(
    {
        (Tensor, name): _silenceable
        for name in ("register_hook", "register_post_accumulate_grad_hook", "retain_grad")
    }
)
