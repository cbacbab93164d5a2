"""Where steps come from: tensors in memory, and anything with `read(start, stop)`."""

from __future__ import annotations

import warnings
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.state import Tree, map_tensors, tensors_of


@runtime_checkable
class Source(Protocol):
    """What a sequence must offer.

    It may also have `__len__` (without it the length is unknown, and a read that returns
    fewer steps than asked marks the end), `time_dim` (where time is in what `read` returns,
    default 0), `weights(start, stop)` (a tensor [n] or [n, B], zero where a target is
    absent), and `state_dict`/`load_state_dict`.
    """

    def read(self, start: int, stop: int) -> tuple[Tree, Tree]:
        """Inputs and targets (or None) of the steps `[start, stop)`."""
        ...


class TensorSequence:
    """A sequence held in tensors, memory-mapped ones included; a read is a view.

    Args:
        inputs: Nested tensors (or numpy arrays) with time on `time_dim`.
        targets: The same, or None where no step has a target.
        time_dim: Where time is in inputs and targets.
        weight: [T] or [T, B], not negative. [T] scales the loss of each step; with [T, B]
            a lane whose weight is zero is left out of that step's loss. Zero means absent.

    Raises:
        ArgumentError: Lengths that differ, an empty sequence, weights that do not fit.
    """

    def __init__(
        self, inputs: Tree, targets: Tree = None, time_dim: int = 0, weight: Tensor | None = None
    ) -> None:
        self.inputs, self.targets = as_tensors(inputs), as_tensors(targets)
        check_time_dim(time_dim)
        self.time_dim = time_dim
        self._num_steps = self._check_lengths()
        self.weight = None if weight is None else checked_weight(weight, self._num_steps)
        if weight is not None and targets is None:
            raise ArgumentError("weight was given without targets, so it would weigh nothing")

    def __len__(self) -> int:
        return self._num_steps

    def read(self, start: int, stop: int) -> tuple[Tree, Tree]:
        """Views of the steps `[start, stop)`."""

        def narrow(tensor: Tensor) -> Tensor:
            return tensor.narrow(self.time_dim, start, stop - start)

        return map_tensors(narrow, self.inputs), map_tensors(narrow, self.targets)

    def weights(self, start: int, stop: int) -> Tensor | None:
        """The weights of the steps `[start, stop)`; None where all are one."""
        return None if self.weight is None else self.weight[start:stop]

    def state_dict(self) -> dict[str, Any]:
        """Nothing: a read depends on its arguments alone."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Accept what `state_dict` returned."""

    def _check_lengths(self) -> int:
        named = [("inputs", t) for t in tensors_of(self.inputs)]
        named += [("targets", t) for t in tensors_of(self.targets)]
        if not named or named[0][0] != "inputs":
            raise ArgumentError(f"inputs={self.inputs!r} holds no tensor")
        lengths = []
        for name, tensor in named:
            check_time_exists(name, tensor, self.time_dim)
            lengths.append(tensor.shape[self.time_dim])
        for (name, tensor), length in zip(named, lengths, strict=True):
            if length != lengths[0]:
                raise ArgumentError(
                    f"{name} of shape {tuple(tensor.shape)} has {length} steps on "
                    f"time_dim={self.time_dim}, inputs have {lengths[0]}"
                )
        if lengths[0] == 0:
            raise ArgumentError("inputs hold an empty sequence; at least one step is needed")
        return lengths[0]


def as_tensors(tree: Tree) -> Tree:
    """The tree with numpy arrays as tensors that share their memory."""
    if isinstance(tree, np.ndarray):
        with warnings.catch_warnings():  # read-only maps are fine: nothing writes to inputs
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(tree)
    if isinstance(tree, tuple | list) and not hasattr(tree, "_fields"):
        return type(tree)(as_tensors(item) for item in tree)
    if type(tree) is dict:
        return {key: as_tensors(item) for key, item in tree.items()}
    return tree


def check_time_dim(time_dim: object) -> None:
    """Raise `ArgumentError` unless `time_dim` is an int of at least 0."""
    if not isinstance(time_dim, int) or isinstance(time_dim, bool) or time_dim < 0:
        raise ArgumentError(f"time_dim={time_dim!r} must be an integer of at least 0")


def check_time_exists(name: str, tensor: Tensor, time_dim: int) -> None:
    """Raise `ArgumentError` unless a tensor has the dimension."""
    if time_dim >= tensor.dim():
        raise ArgumentError(
            f"time_dim={time_dim} does not exist in {name} of shape {tuple(tensor.shape)}"
        )


def checked_weight(weight: Tensor, num_steps: int) -> Tensor:
    """The weight of `num_steps` steps, [T] or [T, B], in float64 on the CPU."""
    if not isinstance(weight, Tensor | np.ndarray | list):
        raise ArgumentError(f"weight={weight!r} must be a tensor [{num_steps}] or with lanes")
    weight = torch.as_tensor(weight).detach().to("cpu", torch.float64)
    if weight.dim() not in (1, 2) or weight.shape[0] != num_steps:
        raise ArgumentError(
            f"weight of shape {tuple(weight.shape)} must be [{num_steps}] or [{num_steps}, lanes]"
        )
    if not bool(torch.isfinite(weight).all()) or bool((weight < 0).any()):
        raise ArgumentError("weight must be finite and not negative; zero means absent")
    return weight
