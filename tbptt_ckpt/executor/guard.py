"""Watches the weights while a window is differentiated, and explains what torch raises."""

from __future__ import annotations

from collections.abc import Sequence

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


class Differentiating:
    """While entered, a graph is recorded, weights are watched, and torch's errors explained."""

    __slots__ = ("_guard", "_stop", "_was_recording")

    def __init__(self, guard: WeightGuard, stop: int) -> None:
        self._guard, self._stop = guard, stop

    def __enter__(self) -> None:
        self._guard.check(self._stop)
        self._was_recording = torch.is_grad_enabled()
        if not self._was_recording:
            torch.set_grad_enabled(True)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not self._was_recording:
            torch.set_grad_enabled(False)
        if error is None:
            self._guard.check(self._stop)
        elif isinstance(error, RuntimeError):
            self._explain(error)

    def _explain(self, error: RuntimeError) -> None:
        """Raise what a user can act on, where torch's error has a known cause."""
        if "backward through the graph a second time" in str(error):
            raise TbpttError(
                "a tensor with the graph of an earlier run was used: whatever the module "
                "carries from step to step with its gradient belongs in the state it returns"
            ) from error
        if "in-place operation" not in str(error) and "inplace operation" not in str(error):
            return
        self._guard.check(self._stop)
        raise TbpttError(
            "a tensor that the gradient needs was modified in place; the module must return a "
            f"new state, or clone it before writing into it ({str(error).splitlines()[0]})"
        ) from error
