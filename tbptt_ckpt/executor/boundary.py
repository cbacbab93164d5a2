"""A state kept at a step, and what else a run that starts from it must find."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from tbptt_ckpt.errors import TbpttError
from tbptt_ckpt.module.ambient import AmbientState
from tbptt_ckpt.module.trees import Tree, map_tensors, tensors_of


@dataclass(frozen=True, slots=True, eq=False)
class Boundary:
    """A detached state kept at a step, with the generators and buffers found there."""

    step: int
    state: Tree
    ambient: AmbientState
    _versions: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_versions", self._state_versions())

    def copied(self) -> Boundary:
        """The same in memory of its own."""
        return Boundary(self.step, map_tensors(torch.clone, self.state), self.ambient)

    def check_untouched(self) -> None:
        """Raise if something wrote into the state since it was kept."""
        if self._versions != self._state_versions():
            raise TbpttError(
                f"the state kept at step {self.step} was modified in place, by the module or by "
                "whoever got it from a window; clone a state before writing into it"
            )

    def _state_versions(self) -> tuple[int, ...]:
        return tuple(tensor._version for tensor in tensors_of(self.state))
