"""A sequence held in tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from tbptt_ckpt.arguments import Dimension, checked
from tbptt_ckpt.data.source import (
    as_tensors,
    check_mapped,
    check_range,
    check_same_source,
    check_time_exists,
    checked_resets,
    checked_weight,
    described,
)
from tbptt_ckpt.errors import ArgumentError, shown
from tbptt_ckpt.module.recurrence import Recurrence, following_time_dim
from tbptt_ckpt.module.trees import Tree, iterate_leaves, map_tensors, tensors_of


class TensorSequence:
    """A sequence held in tensors, memory-mapped ones included; a read is a view.

    Args:
        inputs: Nested tensors (or numpy arrays) with time on `time_dim`.
        targets: The same, or None where no step has a target.
        time_dim: Where time is in inputs and targets; None says nothing, which is 0, and 1 for
            an `nn.RNN/LSTM/GRU` with `batch_first`.
        weight: [T] or [T, B], not negative. [T] scales the loss of each step; with [T, B]
            a lane whose weight is zero is left out of that step's loss. Zero means absent.
        resets: Bools [T] or [T, B], true at the steps whose input is the first of a new
            sequence, in every lane or in each; those steps run from the initial state.

    Raises:
        ArgumentError: Lengths that differ, an empty sequence, weights that do not fit.
    """

    @checked
    def __init__(
        self,
        inputs: Tree,
        targets: Tree = None,
        *,
        time_dim: Dimension | None = None,
        weight: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> None:
        self.inputs, self.targets = as_tensors(inputs), as_tensors(targets)
        self._given = inputs, targets, time_dim, weight, resets
        leaves = iterate_leaves((inputs, targets))
        self._arrays = [leaf for leaf in leaves if isinstance(leaf, np.ndarray)]
        self.time_dim = time_dim or 0
        self._num_steps = self._check_lengths()
        self.weight = checked_weight(weight, self._num_steps)
        self._resets = checked_resets(resets, self._num_steps)
        if weight is not None and targets is None:
            raise ArgumentError("weight was given without targets, so it would weigh nothing")

    def for_module(self, recurrence: Recurrence) -> TensorSequence:
        """The same sequence for a module, with time where its layer has it unless it was said.

        Raises:
            ArgumentError: Neither is it said here, nor is the module such a layer.
        """
        inputs, targets, said, weight, resets = self._given
        if said is not None or following_time_dim(recurrence.time_dim, self.inputs) == 0:
            return self
        if recurrence.layer is None:
            check_time_exists("inputs", tensors_of(self.inputs)[0], recurrence.time_dim)
            raise ArgumentError(
                f"time_dim={recurrence.time_dim} of TBPTT is where the module wants time, and "
                f"{self!r} does not say where it has it: add TensorSequence(..., time_dim="
                f"{recurrence.time_dim}), or time_dim=0 for data with time first"
            )
        return TensorSequence(
            inputs, targets, time_dim=recurrence.time_dim, weight=weight, resets=resets
        )

    def __len__(self) -> int:
        return self._num_steps

    def __repr__(self) -> str:
        parts = [f"{self._num_steps:,} steps of {described(self.inputs)}"]
        if self.targets is not None:
            parts.append(f"targets {described(self.targets)}")
        if self.time_dim:
            parts.append(f"time_dim={self.time_dim}")
        further = {"weight": self.weight, "resets": self._resets}
        parts += [name for name, rows in further.items() if rows is not None]
        return f"TensorSequence({', '.join(parts)})"

    def read(self, start: int, stop: int) -> tuple[Tree, Tree]:
        """Views of the steps `[start, stop)`."""
        check_range(start, stop, self._num_steps)
        for array in self._arrays:
            check_mapped(array)
        inputs, targets = map_tensors(
            lambda tensor: tensor.narrow(self.time_dim, start, stop - start),
            (self.inputs, self.targets),
        )
        return inputs, targets

    def weights(self, start: int, stop: int) -> Tensor | None:
        """The weights of the steps `[start, stop)`; None where all are one."""
        return None if self.weight is None else self.weight[start:stop]

    def resets(self, start: int, stop: int) -> Tensor | None:
        """Which of the steps `[start, stop)` begin a new sequence."""
        return None if self._resets is None else self._resets[start:stop]

    def state_dict(self) -> dict[str, Any]:
        """What identifies the sequence; a read depends on its arguments alone."""
        return {"num_steps": self._num_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Accept what `state_dict` of an equal sequence returned.

        Raises:
            ArgumentError: The sequence has another length.
        """
        check_same_source(state, self.state_dict())

    def _check_lengths(self) -> int:
        named = [("inputs", t) for t in tensors_of(self.inputs)]
        if not named:
            raise ArgumentError(
                f"inputs={shown(self.inputs)} holds no tensor; a sequence of steps that read none "
                "is a list of pairs: [(None, target) for target in targets]"
            )
        if self.targets is not None and not tensors_of(self.targets):
            raise ArgumentError(
                f"targets={shown(self.targets)} holds no tensor; None says "
                "that no step has a target"
            )
        named += [("targets", t) for t in tensors_of(self.targets)]
        for name, tensor in named:
            if name == "inputs":
                check_time_exists(name, tensor, self.time_dim)
        num_steps = named[0][1].shape[self.time_dim]
        for name, tensor in named:
            self._check_steps(name, tensor, num_steps)
        if num_steps == 0:
            raise ArgumentError("inputs hold an empty sequence; at least one step is needed")
        return num_steps

    def _check_steps(self, name: str, tensor: Tensor, num_steps: int) -> None:
        """Raise `ArgumentError` unless a tensor has as many steps as the inputs."""
        time_dim, shape = self.time_dim, tuple(tensor.shape)
        inputs = tensors_of(self.inputs)[0]
        lanes = inputs.shape[1 - time_dim] if inputs.dim() > 1 and time_dim < 2 else None
        has_time = time_dim < tensor.dim()
        if has_time and shape[time_dim] == num_steps:
            return
        if name == "targets" and shape[:1] == (lanes,):
            axis, size = ("", num_steps) if time_dim == 0 else ("[:, None]", f"-1, {num_steps}")
            rest = "".join(f", {length}" for length in shape[1 - (time_dim == 0) :])
            raise ArgumentError(
                f"targets of shape {shape} are one label for each of {lanes} lanes, and a sequence "
                f"has one for each of its {num_steps} steps: repeat them, label{axis}.expand("
                f"{size}{rest}), and count the last alone, weight=torch.arange("
                f"{num_steps}) == {num_steps - 1}; or have each window count its last step, "
                f'TBPTT(loss="last", k1={num_steps})'
            )
        check_time_exists(name, tensor, time_dim)
        raise ArgumentError(
            f"{name} of shape {shape} has {shape[time_dim]} steps on time_dim={time_dim}, inputs "
            f"have {num_steps}; sequences of several lengths are for "
            "LaneSource([TensorSequence(x, y), ...], lanes)"
        )
