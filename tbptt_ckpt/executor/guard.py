"""Watches the weights while a window is differentiated, and explains what torch raises."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from tbptt_ckpt.errors import StaleWeightsError, TbpttError


class WeightGuard:
    """Notices weights that change between a window's advance and its replay.

    Attributes:
        expected: The fingerprint of the weights with which the window runs.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self.expected = self.fingerprint()

    def fingerprint(self) -> tuple[tuple[int, int], ...]:
        """Changes whenever a weight is written to or replaced."""
        return tuple([(p._version, p.data_ptr()) for p in self._parameters])

    def check(self, window_stop: int) -> None:
        """Raise `StaleWeightsError` if a weight changed."""
        if self.fingerprint() != self.expected:
            raise StaleWeightsError(
                f"weights changed while the window up to step {window_stop} was being "
                "differentiated, between its advance and its replay; call optimizer.step() only "
                "between windows"
            )


@contextmanager
def advancing() -> Iterator[None]:
    """While entered, no graph is recorded, and the error of a step that needs one is explained."""
    try:
        with torch.no_grad():
            yield
    except RuntimeError as error:
        if "does not require grad and does not have a grad_fn" not in str(error):
            raise
        raise TbpttError(
            "the module differentiates within a step, and a step that is only advanced records no "
            "graph; put what is differentiated there under `with torch.enable_grad():`, and detach "
            "the state that goes into it"
        ) from error


@contextmanager
def differentiating(guard: WeightGuard, stop: int) -> Iterator[None]:
    """While entered, a graph is recorded, weights are watched, and torch's errors explained."""
    guard.check(stop)
    try:
        with torch.enable_grad():
            yield
    except RuntimeError as error:
        _explain(error, guard, stop)
        raise
    guard.check(stop)


def _explain(error: RuntimeError, guard: WeightGuard, stop: int) -> None:
    """Raise what a user can act on, where torch's error has a known cause."""
    if "backward through the graph a second time" in str(error):
        raise TbpttError(
            "a tensor with the graph of an earlier run was used: whatever the module "
            "carries from step to step with its gradient belongs in the state it returns"
        ) from error
    if "in-place operation" not in str(error) and "inplace operation" not in str(error):
        return
    guard.check(stop)
    raise TbpttError(
        "a tensor that the gradient needs was modified in place; the module must return a "
        f"new state, or clone it before writing into it ({str(error).splitlines()[0]})"
    ) from error
