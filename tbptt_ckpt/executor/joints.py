"""Joints: recorded states inside a window, from which a later block restarts in one graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.module.trees import (
    Tree,
    is_differentiable,
    replace_tensors,
    structure,
    tensors_of,
)


class _Rejoin(torch.autograd.Function):
    """The value of a recorded state, the gradient of the recomputed one."""

    @staticmethod
    def forward(_ctx: Any, recorded: Tensor, _recomputed: Tensor) -> Tensor:
        return recorded.clone()

    @staticmethod
    def backward(_ctx: Any, *grads: Any) -> Any:
        return None, *grads


def rejoined(recorded_state: Tree, state: Tree) -> Tree:
    """A recorded state whose gradient goes to the recomputed end of the block before it."""
    check_same_structure(state, recorded_state)
    pairs = zip(tensors_of(recorded_state), tensors_of(state), strict=True)
    joined = [
        _Rejoin.apply(recorded, recomputed)  # type: ignore[no-untyped-call]
        if is_differentiable(recorded)
        else recorded
        for recorded, recomputed in pairs
    ]
    return replace_tensors(recorded_state, joined)


def check_same_structure(state: Tree, expected: Tree) -> None:
    """Raise `ArgumentError` unless a state is nested like the one before."""
    if structure(state) != structure(expected):
        raise ArgumentError(
            f"the module returned a state of another structure: {structure(state)} "
            f"instead of {structure(expected)}"
        )
