"""Parts of one step that a segment module runs for all its steps at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tbptt_ckpt.errors import TbpttWarning
from tbptt_ckpt.module.ambient import Ambient, untouched
from tbptt_ckpt.module.held_parts import Precision, hold_step
from tbptt_ckpt.module.inside import name_of
from tbptt_ckpt.module.trees import Tree, iterate_tensors, join_trees, map_tensors, tensors_of

Part = Callable[[Any], Any]


class FoldedPart:
    """Runs a part with time folded into the lanes, unless its lanes know of each other.

    That is looked at in the first call of several steps in each mode, where a part that draws
    random numbers may give each way what it likes. What mixes lanes runs step by step.

    Args:
        name: What a warning calls it.
        time_dim: Where time is, 0 or 1; lanes are on the other.
    """

    def __init__(self, name: str, time_dim: int) -> None:
        self._name, self._time_dim = name, time_dim
        self._folds: dict[bool, bool] = {}  # whether it does, by mode, once it is known

    def run(self, part: Part, value: Tree) -> Any:
        """The part over all steps, [T, B, ...] or [B, T, ...]."""
        mode = bool(getattr(part, "training", False))
        if mode not in self._folds and not torch.compiler.is_compiling():
            if self._num_steps(value) < 2:
                return _folded(part, value)
            self._look(part, value, mode)
        return _folded(part, value) if self._folds.get(mode, True) else self._in_steps(part, value)

    def _look(self, part: Part, value: Tree, mode: bool) -> None:
        few = map_tensors(lambda t: t.detach().narrow(self._time_dim, 0, 2).clone(), value)
        with untouched(part, tensors=tensors_of(few)) as start_over, torch.no_grad():
            ambient = Ambient([part], tensors_of(few))
            before, precision = ambient.digest(), Precision()
            with precision:
                steps = self._in_steps(part, map_tensors(Tensor.clone, few))
            start_over()
            folded = _folded(part, few)
            draws = ambient.digest() != before
        self._folds[mode] = draws or hold_step((steps, None), (folded, None), precision)
        if not self._folds[mode]:
            warnings.warn(
                f"{self._name}={name_of(part)} of a Recurrent does not treat every lane by itself, "
                "so that it runs step by step",
                TbpttWarning,
                stacklevel=2,
            )

    def _in_steps(self, part: Part, value: Tree) -> Any:
        outputs = [part(self._step(value, step)) for step in range(self._num_steps(value))]
        return join_trees(partial(torch.stack, dim=self._time_dim), outputs)

    def _step(self, value: Tree, step: int) -> Tree:
        return map_tensors(lambda tensor: tensor.select(self._time_dim, step), value)

    def _num_steps(self, value: Tree) -> int:
        return next((t.shape[self._time_dim] for t in iterate_tensors(value)), 0)


def _folded(part: Part, value: Tree) -> Any:
    """A part of all steps at once, as if they were lanes."""
    sizes: list[Any] = []

    def fold(tensor: Tensor) -> Tensor:
        sizes.append(tensor.shape[:2])
        return tensor.flatten(0, 1)

    result = part(map_tensors(fold, value))
    return map_tensors(lambda tensor: tensor.unflatten(0, sizes[0]), result)
