"""A state kept at a step, what else a run from there must find, and how one graph passes it."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tbptt_ckpt.errors import ArgumentError, TbpttError
from tbptt_ckpt.module.ambient import AmbientState
from tbptt_ckpt.module.trees import (
    Tree,
    copy_containers,
    is_differentiable,
    map_tensors,
    replace_tensors,
    structure,
    tensors_of,
)


@dataclass(frozen=True, slots=True, eq=False)
class Boundary:
    """A detached state kept at a step, with the generators and buffers found there."""

    step: int
    state: Tree
    ambient: AmbientState
    _tensors: list[Tensor] = field(init=False)
    _versions: list[int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_tensors", tensors_of(self.state))
        object.__setattr__(self, "_versions", self._state_versions())

    def copied(self, handed_on: Container[int] = ()) -> Boundary:
        """The same in memory of its own, but for tensors at addresses that were `handed_on`.

        What lies alone in an accelerator's memory stays there: that is no heap to be split.
        """

        def copy(tensor: Tensor) -> Tensor:
            stays = address_of(tensor) in handed_on or _lies_alone(tensor)
            return tensor if stays else tensor.clone()

        return Boundary(self.step, map_tensors(copy, self.state), self.ambient)

    def handed_on(self, origin: Boundary) -> dict[int, int]:
        """Addresses of what a run from `origin` handed on unchanged, each with its bytes."""
        held = {address_of(tensor) for tensor in origin._tensors} - {0}
        found = {address_of(tensor): tensor.nbytes for tensor in self._tensors}
        return {address: size for address, size in found.items() if address in held}

    def check_untouched(self) -> None:
        """Raise if something wrote into the state since it was kept."""
        if self._versions != self._state_versions():
            raise TbpttError(
                f"the state kept at step {self.step} was modified in place, by the module or by "
                "whoever got it from a window; clone a state before writing into it"
            )

    def _state_versions(self) -> list[int]:
        return [tensor._version for tensor in self._tensors]


def address_of(tensor: Tensor) -> int:
    """Where its values are; 0 for tensors that are made of others."""
    plain = type(tensor) is Tensor and tensor.layout is torch.strided
    return tensor.data_ptr() if plain else 0


def _lies_alone(tensor: Tensor) -> bool:
    """Whether it is all of its memory, in blocks of an accelerator's allocator."""
    if tensor.device.type == "cpu" or type(tensor) is not Tensor:
        return False
    is_plain = tensor.layout is torch.strided
    return is_plain and tensor.untyped_storage().nbytes() == tensor.nbytes


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
    return replace_tensors(copy_containers(recorded_state), joined)


def check_same_structure(state: Tree, expected: Tree) -> None:
    """Raise `ArgumentError` unless a state is nested like the one before."""
    if structure(state) != structure(expected):
        raise ArgumentError(
            f"the module returned a state of another structure: {structure(state)} "
            f"instead of {structure(expected)}"
        )
