"""Two ranks with lanes of their own, and one process with all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import naive
import pytest
import torch
import torch.distributed as dist
from cases import gradients, random_data, random_state
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tbptt_ckpt import TensorSequence

STEPS, K1, LANES = 11, 3, 4
LANES_OF = (slice(0, 3), slice(3, 4))  # by rank
STEPS_OF = (STEPS, 6)  # lanes of the second rank end earlier


def masked_mean(y: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(sum, count) of what is not NaN."""
    counts = ~target.isnan()
    return (y - target)[counts].square().sum(), counts.sum()


def all_lanes() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs, targets, NaN where there are none, resets and the first state of all ranks."""
    inputs, targets = random_data(STEPS, lanes=LANES)
    resets = torch.zeros(STEPS, LANES, dtype=torch.bool)
    resets[4, 1] = resets[7, 0] = resets[5, 3] = True
    targets[8:, 2] = torch.nan
    return inputs, targets, resets, random_state(lanes=LANES)


def sequence_of(rank: int, count: int, *, is_masked: bool) -> tuple[TensorSequence, Tensor]:
    """The lanes of a rank; masked by NaN for a loss that knows it, otherwise by weights."""
    inputs, targets, resets, state = all_lanes()
    lanes = LANES_OF[rank] if count == 2 else slice(None)
    steps = STEPS_OF[rank] if count == 2 else STEPS
    inputs, targets, resets = (each[:steps, lanes] for each in (inputs, targets, resets))
    if count == 1:
        targets[STEPS_OF[1] :, LANES_OF[1]] = torch.nan
    weight = None if is_masked else (~targets.isnan()).all(-1).double()
    targets = targets if is_masked else targets.nan_to_num()
    return TensorSequence(inputs, targets, weight=weight, resets=resets), state[lanes]


class Joined:
    """Plain BPTT in one process over the lanes of both ranks, with its updates."""

    def __init__(self, module: nn.Module, lr: float, k2: int | None, how: dict[str, Any]) -> None:
        inputs, targets, resets, state = all_lanes()
        targets[STEPS_OF[1] :, LANES_OF[1]] = torch.nan

        def step(given: Any, h: Tensor) -> Any:
            x, begins = given
            return module(x, torch.where(begins[:, None], state, h))

        weights = list(module.parameters())
        problem = naive.Problem(
            step=step,
            loss_fn=masked_mean,
            inputs=list(zip(inputs, resets, strict=True)),
            targets=list(targets),
            init_state=state,
            parameters=weights,
        )
        self.losses, self.updates, group = [], [], []
        reduction = how.get("reduction", "mean")
        optimizer = torch.optim.SGD(weights, lr=lr)
        overlap = naive.OVERLAPS[how.get("overlap", "refresh")]
        for window in overlap(problem, K1, k2, reduction=reduction):
            self.losses.append(float(window.loss))
            group.append(window.grads)
            if len(group) == how.get("accumulate", 1) or window.stop == STEPS:
                for weight, *grads in zip(weights, *group, strict=True):
                    weight.grad = sum(grads) / (len(group) if reduction == "mean" else 1)
                if "clip_grad_norm" in how:
                    nn.utils.clip_grad_norm_(weights, how["clip_grad_norm"])
                self.updates.append((window.stop, gradients(weights)))
                optimizer.step()
                group = []
        self.weights = weights


class Traffic:
    """Counts what is sent of gradients and of weights."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reductions = self.gathers = 0
        # By their names in torch 2.13, or before.
        scatter, gather = (
            next(name for name in names if hasattr(dist, name))
            for names in (
                ("reduce_scatter_single", "reduce_scatter_tensor"),
                ("all_gather_single", "all_gather_into_tensor"),
            )
        )
        for name in ("all_reduce", scatter, gather):
            monkeypatch.setattr(dist, name, self._counted(name, getattr(dist, name)))

    def _counted(self, name: str, send: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.gathers += name.startswith("all_gather")
            self.reductions += not name.startswith("all_gather")
            return send(*args, **kwargs)

        return counted

    @staticmethod
    def watch(module: nn.Module) -> nn.Module:
        if not isinstance(module, DistributedDataParallel):
            return module

        module.register_comm_hook(None, default_hooks.allreduce_hook)  # torch's own is in C++
        return module


def sharded(module: nn.Module) -> nn.Module:
    return fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def sharded_inside(module: nn.Module) -> nn.Module:
    """One weight is in a group of its own, and one is not sharded."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(module.recurrence, mesh=mesh)
    return fully_shard(module, mesh=mesh, ignored_params={module.readout.bias})


def in_copies(module: nn.Module) -> nn.Module:
    """Every rank has a copy of the only shard."""
    names = ("copies", "shards")
    return fully_shard(
        module, mesh=init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=names)
    )


def held(tensors: Sequence[Tensor], likes: Sequence[Any]) -> list[Tensor]:
    """The parts of whole tensors that this rank holds, where others are sharded."""
    return [_part(*pair) for pair in zip(tensors, likes, strict=True)]


def _part(tensor: Tensor, like: Any) -> Tensor:
    if not isinstance(like, DTensor) or like.device_mesh.ndim > 1:
        return tensor
    parts = [*torch.chunk(tensor, dist.get_world_size()), tensor[:0]]
    return parts[min(dist.get_rank(), len(parts) - 1)]


def local(tensors: Sequence[Any]) -> list[Tensor]:
    return [each.to_local() if isinstance(each, DTensor) else each for each in tensors]
