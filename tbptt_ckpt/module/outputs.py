"""Whether anybody will look at the outputs of the module call that is running.

An advance wants the state at its end and nothing else. A module that asks can leave its readout
out of it, which with a large vocabulary is most of what a step costs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from tbptt_ckpt.module.ambient import Ambient, untouched
from tbptt_ckpt.module.trees import Tree, map_tensors, tensors_of


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


class Omission:
    """Whether a part may be left out: not where it draws random numbers or writes buffers.

    A step that leaves it out would hand other numbers on than one that does not, and which steps do
    depends on the strategy. It is looked at before it is first left out in each mode.

    Args:
        time_dim: Where time is in what the part would be given, if it is.
    """

    __slots__ = ("_allowed", "_time_dim")

    def __init__(self, time_dim: int | None) -> None:
        self._allowed: dict[bool, bool] = {}  # by mode
        self._time_dim = time_dim

    def is_allowed(self, part: Callable[[Any], Any], value: Tree) -> bool:
        """The answer for a part that would be given `value`."""
        mode = bool(getattr(part, "training", False))
        if mode not in self._allowed:
            self._allowed[mode] = _leaves_no_trace(part, map_tensors(self._one_step, value))
        return self._allowed[mode]

    def _one_step(self, tensor: Tensor) -> Tensor:
        one = tensor if self._time_dim is None else tensor.select(self._time_dim, 0)
        return one.detach().clone()


def _leaves_no_trace(part: Callable[[Any], Any], value: Tree) -> bool:
    ambient = Ambient([part], tensors_of(value))
    with untouched(part, tensors=tensors_of(value), ambient=ambient), torch.no_grad():
        before = ambient.capture()
        ambient.about_to_run()
        part(value)
        return ambient.capture() is before
