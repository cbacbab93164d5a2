"""When meters take in what was recorded: every few calls of a module, so that records stay few."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# A call of a cell makes some 130 records of up to 0.9 KiB, those of its backward included.
_CALLS_PER_READ = 64
_CALLS_PER_HOOK = 256

# Of a call of a module, with what makes the tensors of its state.
Told = Callable[[Callable[[], Iterable[Tensor]]], None]


class _Readers(threading.local):
    def __init__(self) -> None:
        self.reads: list[Callable[[], None]] = []
        self.calls = 0

    def called(self, tensors: Callable[[], Iterable[Tensor]]) -> None:
        self.calls += 1
        if self.calls % _CALLS_PER_READ == 0:
            self.read()
        if self.calls % _CALLS_PER_HOOK == 0 and torch.is_grad_enabled():
            self._read_on_gradient(tensors())

    def read(self) -> None:
        for read in self.reads:
            read()

    def _read_on_gradient(self, tensors: Iterable[Tensor]) -> None:
        """Read when the gradients of these arrive, since one backward may run many steps.

        Of every few hundred calls only: torch frees graph nodes that Python has touched
        recursively, and a chain of tens of thousands of them overflows the stack.
        """
        for tensor in tensors:
            if tensor.requires_grad:
                tensor.register_hook(lambda _: self.read())  # type: ignore[no-untyped-call]


_this_thread = _Readers()


@contextmanager
def reading(read: Callable[[], None]) -> Iterator[None]:
    """Have a meter read now and then, while this thread calls modules.

    What is run is told so, and nothing is put around a module or on it: a module that is
    called in another way may be run in another way, and the meter would see that.
    """
    if not _this_thread.reads:
        _this_thread.calls = 0
    _this_thread.reads.append(read)
    try:
        yield
    finally:
        _this_thread.reads.remove(read)


def told_of_calls() -> Told | None:
    """What this thread is to tell of every call of a module; None where no meter wants to know."""
    return _this_thread.called if _this_thread.reads else None
