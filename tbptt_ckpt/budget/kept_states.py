"""What a state takes that is kept, on its device and on the host."""

from __future__ import annotations

import tracemalloc

import torch

from tbptt_ckpt.executor.boundary import Boundary
from tbptt_ckpt.memory.resident import malloc_bytes
from tbptt_ckpt.memory.storages import distinct_storages, tensor_bytes
from tbptt_ckpt.module.ambient import AmbientState
from tbptt_ckpt.module.trees import Tree, copy_containers, tensors_of
from tbptt_ckpt.schedule.costs import Costs

_NUM_BOUNDARIES = 32


def kept_bytes(later: Boundary, before: Boundary, device: torch.device) -> tuple[int, int, int]:
    """What keeping a state takes, of it generators and buffers, and what is kept once for all.

    Bytes of the device: a generator's state may be the host's.
    """
    handed_on = sum(later.handed_on(before).values())
    state = tensor_bytes(later.state, device=device) - handed_on
    ambient = _ambient_bytes(later, before.ambient, device)
    return state + ambient, ambient, handed_on


def lacking_bytes(first: Tree, costs: Costs, device: torch.device) -> int:
    """What a first state may take less than those that steps reach, and make up for.

    From None a module makes one for itself; kernels copy tensors that share their memory.
    """
    reached = costs.state_bytes - costs.ambient_bytes + costs.handed_on_bytes
    tensors = tensors_of(first)
    is_shared = len(distinct_storages(tensors)) < len(tensors)
    return max(0, reached - (0 if is_shared else tensor_bytes(tensors, device=device)))


def _ambient_bytes(later: Boundary, earlier: AmbientState, device: torch.device) -> int:
    """Generators and buffers that a state is kept with, as an earlier one lacks them."""
    ambient = later.ambient
    if ambient is earlier:
        return 0
    drawn = (ambient.cpu_random, *ambient.device_random)
    before = (earlier.cpu_random, *earlier.device_random)
    own = [new for new, old in zip(drawn, before, strict=True) if new is not old]
    moved = zip(ambient.generators, earlier.generators, strict=True)
    own += [tensor for new, old in moved if new is not old for tensor in tensors_of(new.values)]
    changed = zip(ambient.buffers, earlier.buffers, strict=True)
    # A value that is restored has a second tensor, to stand in the module.
    moved_buffers = [new.values for new, old in changed if new is not old]
    return tensor_bytes(own, device=device) + 2 * tensor_bytes(moved_buffers, device=device)


def host_state_bytes(boundary: Boundary) -> float:
    """Python objects and tensor headers of one kept state."""
    tracing = tracemalloc.is_tracing()
    if not tracing:
        tracemalloc.start()
    objects, in_use = tracemalloc.get_traced_memory()[0], malloc_bytes()
    kept = [
        Boundary(step, copy_containers(boundary.state), boundary.ambient)
        for step in range(_NUM_BOUNDARIES)
    ]
    objects = tracemalloc.get_traced_memory()[0] - objects
    native = 0 if in_use is None else (malloc_bytes() or 0) - in_use
    if not tracing:
        tracemalloc.stop()
    return max(0, objects + native) / len(kept)
