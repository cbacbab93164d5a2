"""Is a scalar loss of a segment the mean over its steps? Asked of a few steps, now and then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.executor.weighted_steps import narrow
from tbptt_ckpt.module.trees import Tree, map_tensors

# Steps that are compared, in unequal parts of one and two; they take next to no memory.
_STEPS = 3
# Relative to the magnitudes. Rounding of float32 may cancel to the first; in float64, in which a
# difference is looked at again, it comes nowhere near the second.
_SUSPICIOUS, _CERTAIN = 1e-3, 1e-6


class MeanCheck:
    """Holds a loss against its own parts: in its first calls, and in ever fewer later ones."""

    def __init__(self, loss_fn: Callable[[Any, Any], Any]) -> None:
        self._loss_fn = loss_fn
        self._num_calls = 0

    def check(self, part: tuple[Tree, Tree], num_steps: int, time_dim: int) -> None:
        """A call over so many steps was taken as a mean.

        Raises:
            ArgumentError: It is none.
        """
        if num_steps < _STEPS:
            return
        self._num_calls = number = self._num_calls + 1
        if number > 8 and number & (number - 1):
            return
        first = (7 * number) % (num_steps - _STEPS + 1)
        detached = map_tensors(Tensor.detach, part)
        few = narrow(detached, first, first + _STEPS, num_steps, time_dim)
        with torch.no_grad():
            if _difference(self._values(few, time_dim)) <= _SUSPICIOUS:
                return
            try:
                values, bound = self._values(map_tensors(_in_double, few), time_dim), _CERTAIN
            except RuntimeError:  # the loss has weights of its own
                values, bound = self._values(few, time_dim), 50 * _SUSPICIOUS
        if _difference(values) > bound:
            whole, one, two = values
            raise ArgumentError(
                f"loss_fn gave {whole:.6g} for {_STEPS} steps of a segment, {one:.6g} for the "
                f"first and {two:.6g} for the others: no mean of its steps, so the gradient would "
                "depend on where segments end. If it sums or leaves positions out, return "
                "(loss_sum, weight); if it couples neighbouring steps, make that part of the "
                "module's output"
            )

    def _values(self, few: Tree, time_dim: int) -> tuple[float, float, float]:
        parts = ((0, _STEPS), (0, 1), (1, _STEPS))
        calls = (self._loss_fn(*narrow(few, low, high, _STEPS, time_dim)) for low, high in parts)
        whole, one, two = (float(value) for value in calls)
        return whole, one, two


def _difference(values: tuple[float, float, float]) -> float:
    whole, one, two = values
    expected = (one + (_STEPS - 1) * two) / _STEPS
    size = abs(whole) + (abs(one) + (_STEPS - 1) * abs(two)) / _STEPS
    if whole != whole or expected != expected:
        return 0.0 if whole != whole and expected != expected else 1.0
    return abs(whole - expected) / size if size else 0.0


def _in_double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
