"""Whether anybody will look at the outputs of the module call that is running.

An advance wants the state at its end and nothing else. A module that asks can leave its readout
out of it, which with a large vocabulary is most of what a step costs.
"""

from __future__ import annotations

import threading
from typing import Self

import torch


class _Thread(threading.local):
    needed = True
    asked = False


_thread = _Thread()


def outputs_needed() -> bool:
    """Whether the outputs of the module call that is running will be used; for a module to ask.

    False while a window only advances to a later state, or runs the steps before those whose
    loss it counts. The module may then return anything as its output, such as None, and save
    what it costs:

        def forward(self, inputs, state):
            hidden, state = self.lstm(inputs, state)
            return self.readout(hidden) if outputs_needed() else None, state

    The state must be the same either way. So what is left out must not draw random numbers and
    must not change buffers that the state depends on; `verify` tells.

    Returns:
        True where no window of this package is running in this thread, and in compiled code,
        which is made once for both answers.
    """
    if torch.compiler.is_compiling():
        return True
    _thread.asked = True
    return _thread.needed


class OutputsNeeded:
    """While entered, `outputs_needed()` has the given answer in this thread."""

    __slots__ = ("_before", "_needed")

    def __init__(self, needed: bool) -> None:
        self._needed = needed

    def __enter__(self) -> Self:
        self._before = _thread.needed
        _thread.needed, _thread.asked = self._needed, False
        return self

    def are_whole(self) -> bool:
        """Whether nobody was told to leave an output out."""
        return self._needed or not _thread.asked

    def __exit__(self, *_: object) -> None:
        _thread.needed = self._before
