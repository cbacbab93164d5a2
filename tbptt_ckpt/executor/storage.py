"""How the states that windows keep are stored: where, and in how many bits."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tbptt_ckpt.executor.boundary import Boundary, address_of
from tbptt_ckpt.executor.kept_states import Folder, KeptStates
from tbptt_ckpt.executor.pinned_states import HostMemory
from tbptt_ckpt.module.trees import map_tensors, replace_tensors, tensors_of

IN_HOST_MEMORY = "host"


Place = Folder | HostMemory  # of the states of a window, if not where steps leave them


def place_of(name: str, given: str | Path | None) -> Place | None:
    """The place that an argument names; None for none."""
    if given is None:
        return None
    return HostMemory() if given == IN_HOST_MEMORY else Folder.checked(name, given)


@dataclass(frozen=True, slots=True)
class Storage:
    """How states are stored.

    Attributes:
        place: Where they are; None for in their device's memory.
        dtype: What wider floating tensors are rounded to; None for none.
    """

    place: Place | None = None
    dtype: torch.dtype | None = None

    def is_plain(self, device: torch.device) -> bool:
        """Whether states of a device are in its memory as they are."""
        return self.place_for(device) is None and self.dtype is None

    def place_for(self, device: torch.device) -> Place | None:
        """Where states of a device are; None for in its memory."""
        return self.place if self.place is not None and self.place.serves(device) else None

    def new(self) -> KeptStates:
        """What keeps the states of one window."""
        kept = KeptStates() if self.place is None else self.place.new()
        return kept if self.dtype is None else RoundedStates(kept, self.dtype)

    def saved_bytes(self, boundary: Boundary, handed_on: Container[int]) -> int:
        """How many bytes of a state, without what is handed on, rounding saves."""
        dtype = self.dtype
        if dtype is None:
            return 0
        own = [t for t in tensors_of(boundary.state) if address_of(t) not in handed_on]
        rounded = [t for t in own if _is_rounded(t.dtype, dtype)]
        return sum(t.numel() * (t.itemsize - dtype.itemsize) for t in rounded)

    def __str__(self) -> str:
        where = "" if self.place is None else f" in {self.place}"
        return where if self.dtype is None else f"{where} in {str(self.dtype).split('.')[-1]}"


class RoundedStates(KeptStates):
    """States whose floating tensors are kept in fewer bits: what is found was rounded once."""

    rounds = True

    def __init__(self, kept: KeptStates, dtype: torch.dtype) -> None:
        self._kept, self._dtype = kept, dtype
        self._dtypes: dict[int, tuple[torch.dtype, ...]] = {}
        self._last: tuple[torch.dtype, ...] = ()  # one object for all that are alike

    def __contains__(self, step: int) -> bool:
        return step in self._kept

    def keep(self, boundary: Boundary, handed_on: Mapping[int, int]) -> Boundary:
        """Keep a state rounded; the run goes on from it as it is."""

        def rounded(tensor: Tensor) -> Tensor:
            stays = address_of(tensor) in handed_on or not _is_rounded(tensor.dtype, self._dtype)
            return tensor if stays else tensor.to(self._dtype)

        dtypes = tuple(tensor.dtype for tensor in tensors_of(boundary.state))
        self._last = self._last if dtypes == self._last else dtypes
        self._dtypes[boundary.step] = self._last
        state = map_tensors(rounded, boundary.state)
        self._kept.keep(Boundary(boundary.step, state, boundary.ambient), handed_on)
        return boundary

    def find(self, step: int) -> Boundary:
        """The state kept at a step, in its own dtypes."""
        found = self._kept.find(step)
        pairs = zip(tensors_of(found.state), self._dtypes[step], strict=True)
        state = replace_tensors(found.state, [tensor.to(dtype) for tensor, dtype in pairs])
        return Boundary(step, state, found.ambient)

    def drop(self, step: int) -> None:
        """Keep it no longer."""
        self._kept.drop(step)
        del self._dtypes[step]

    def close(self) -> None:
        """Nothing is kept any longer."""
        self._kept.close()


def _is_rounded(dtype: torch.dtype, to: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize > to.itemsize
