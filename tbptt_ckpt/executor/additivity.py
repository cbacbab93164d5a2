"""Is a scalar loss of a segment the mean over its steps? Asked of a few steps, now and then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.executor.weighted_steps import narrow
from tbptt_ckpt.module.trees import Tree, map_tensors

# Most steps that are compared, in unequal parts of one and two; they take next to no memory.
_MOST_STEPS = 3
# Relative to the magnitudes, of which rounding may leave more where signs differ.
_IN_DOUBLE, _OTHERWISE = 1e-6, 5e-2


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
        if num_steps < 2:
            return
        steps = min(num_steps, _MOST_STEPS)
        self._num_calls = number = self._num_calls + 1
        if number > 8 and number & (number - 1):
            return
        first = (7 * number) % (num_steps - steps + 1)
        detached = map_tensors(Tensor.detach, part)
        few = narrow(detached, first, first + steps, num_steps, time_dim)
        with torch.no_grad():
            try:
                values, in_double = self._values(map_tensors(_in_double, few), steps, time_dim)
            except RuntimeError:  # the loss has weights of its own
                values, in_double = self._values(few, steps, time_dim)
        if _difference(values, steps) > (_IN_DOUBLE if in_double else _OTHERWISE):
            whole, one, two = values
            raise ArgumentError(
                f"loss_fn gave {whole:.6g} for {steps} steps of a segment, {one:.6g} for the "
                f"first and {two:.6g} for the others: no mean of its steps, so the gradient would "
                "depend on where segments end. If it sums or leaves positions out, return "
                "(loss_sum, weight); if it couples neighbouring steps, make that part of the "
                "module's output"
            )

    def _values(
        self, few: Tree, steps: int, time_dim: int
    ) -> tuple[tuple[float, float, float], bool]:
        """The loss of all, of the first, of the others; and whether they are of float64."""
        parts = ((0, steps), (0, 1), (1, steps))
        values = [self._loss_fn(*narrow(few, low, high, steps, time_dim)) for low, high in parts]
        whole, one, two = (float(value) for value in values)
        return (whole, one, two), values[0].dtype == torch.float64


def _difference(values: tuple[float, float, float], steps: int) -> float:
    whole, one, two = values
    expected = (one + (steps - 1) * two) / steps
    size = abs(whole) + (abs(one) + (steps - 1) * abs(two)) / steps
    if whole != whole or expected != expected:
        return 0.0 if whole != whole and expected != expected else 1.0
    return abs(whole - expected) / size if size else 0.0


def _in_double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
