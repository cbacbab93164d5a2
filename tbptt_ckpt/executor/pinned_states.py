"""States of an accelerator that are kept in the host's memory.

NOTE [Why on the stream of the steps]
Memory that is pinned takes copies while the host goes on, and each waits its turn among the steps.
So the block that a state leaves is there for the next step, and a place that was read for the next
state, without an event and however far the host is ahead. On a stream beside it copies would go on
while steps run, and blocks would wait for them: as many as the host is ahead, which no plan knows.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from tbptt_ckpt.errors import ArgumentError, TbpttError
from tbptt_ckpt.executor.boundary import Boundary, address_of
from tbptt_ckpt.executor.kept_states import KeptStates
from tbptt_ckpt.memory.sizes import format_bytes
from tbptt_ckpt.module.ambient import AmbientState
from tbptt_ckpt.module.host import is_waited_for
from tbptt_ckpt.module.trees import Tree, map_tensors, tensors_of

_TRIED = 9  # states that are copied there and back to learn the time of one


class _Pinned(NamedTuple):
    """A tensor whose values are in the host's memory."""

    values: Tensor
    device: torch.device
    fits: object  # what else may lie there


class PinnedStates(KeptStates):
    """The states of a window in pinned memory; those that are the host's own as in memory.

    Generators, buffers and what is handed on stay where they are.
    """

    def __init__(self) -> None:
        super().__init__()
        self._frames: dict[int, tuple[Tree, AmbientState]] = {}
        self._free: dict[object, list[Tensor]] = {}  # of dropped states, by what fits there

    def __contains__(self, step: int) -> bool:
        return step in self._frames or super().__contains__(step)

    def keep(self, boundary: Boundary, handed_on: Mapping[int, int]) -> Boundary:
        """Have a state copied; the run goes on from it as it is."""
        if not any(map(is_waited_for, tensors_of(boundary.state))):
            return super().keep(boundary, handed_on)

        def pinned(tensor: Tensor) -> Tensor | _Pinned:
            if address_of(tensor) in handed_on:
                return tensor
            if not is_waited_for(tensor):
                return _Pinned(tensor.clone(), tensor.device, None)
            # A place read for one device is ready for that device's next copy, not for another's.
            fits = type(tensor), tensor.device, tensor.dtype, tensor.size(), tensor.stride()
            free = self._free.get(fits)
            place = free.pop() if free else pinned_like(tensor)
            return _Pinned(place.copy_(tensor, non_blocking=True), tensor.device, fits)

        self._frames[boundary.step] = map_tensors(pinned, boundary.state), boundary.ambient
        return boundary

    def find(self, step: int) -> Boundary:
        """The state kept at a step, copied into memory of its device."""
        if step not in self._frames:
            return super().find(step)
        frame, ambient = self._frames[step]

        def read(kept: _Pinned) -> Tensor:
            return kept.values.to(kept.device, non_blocking=True, copy=True)

        return Boundary(step, map_tensors(read, frame, _Pinned), ambient)

    def drop(self, step: int) -> None:
        """Let later states take its place."""
        if step not in self._frames:
            return super().drop(step)

        def give_back(kept: _Pinned) -> None:
            if kept.fits is not None:
                self._free.setdefault(kept.fits, []).append(kept.values)

        map_tensors(give_back, self._frames.pop(step)[0], _Pinned)
        return None

    def close(self) -> None:
        """Nothing is kept any longer: torch pins other tensors there when copies are done."""
        super().close()
        self._frames.clear()
        self._free.clear()


@dataclass(frozen=True, slots=True)
class HostMemory:
    """The host's memory, as a place for an accelerator's states."""

    is_memory: ClassVar[bool] = True

    def serves(self, device: torch.device) -> bool:
        """Whether states of a device are elsewhere without it."""
        return device.type != "cpu"

    def new(self) -> KeptStates:
        """What keeps the states of one window."""
        return PinnedStates()

    def seconds(self, num_bytes: int, device: torch.device) -> float:
        """The time of copying a state of so many bytes there and back, measured now."""
        state = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        place, times = pinned_like(state), []
        for _ in range(_TRIED):
            torch.accelerator.synchronize(device)
            began = time.perf_counter()
            place.copy_(state, non_blocking=True).to(device, non_blocking=True)
            torch.accelerator.synchronize(device)
            times.append(time.perf_counter() - began)
        return sorted(times)[_TRIED // 2]

    def __str__(self) -> str:
        return "the host's memory"


def pinned_like(tensor: Tensor) -> Tensor:
    """Memory of the host from which and to which a device copies by itself."""
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise ArgumentError(
            f"a state has a tensor of {tensor.layout}, and only dense ones are kept in the host's "
            "memory; leave offload out"
        )
    try:
        return torch.empty_like(tensor, device=torch.device("cpu"), pin_memory=True)
    except RuntimeError as error:
        raise TbpttError(
            f"states are kept in the host's memory, and another {format_bytes(tensor.nbytes)} "
            "could not be pinned there: this window has made no update; keep fewer states (longer "
            "leaves), or name a folder as offload"
        ) from error
