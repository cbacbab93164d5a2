"""Modules and optimizers that Fabric and Accelerate have set up, on ranks that train together."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cases import gradients, mean_loss, relative_error, tanh_cell
from joined_ranks import K1, Joined, Traffic, held, local, masked_mean, sequence_of
from several_ranks import free_port, on_two_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tbptt_ckpt import TBPTT

CASES: tuple[dict[str, Any], ...] = (
    {"strategy": "uniform:{}"},  # plans need not be the same
    {"strategy": "step", "accumulate": 2, "clip_grad_norm": 0.05},
    {"strategy": "uniform:2", "time_batching": True},
    {"strategy": "auto", "overlap": "stale"},
    {"strategy": "uniform:2", "executor": "checkpoint"},
)


def of_fabric(count: int) -> Callable[..., Any]:
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=count, strategy="ddp")
    fabric.launch()
    return lambda module, make: fabric.setup(module, make(module.parameters()))


def of_fabric_in_shards(count: int) -> Callable[..., Any]:
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import ModelParallelStrategy

    strategy = ModelParallelStrategy(
        lambda module, mesh: fully_shard(module, mesh=mesh["data_parallel"]),
        data_parallel_size=count,
        tensor_parallel_size=1,
    )
    fabric = Fabric(accelerator="cpu", devices=count, strategy=strategy)
    fabric.launch()

    def prepare(module: nn.Module, make: Any) -> Any:
        module = fabric.setup_module(module)
        return module, fabric.setup_optimizers(make(module.parameters()))

    return prepare


def of_accelerate(count: int) -> Callable[..., Any]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == count
    return lambda module, make: accelerator.prepare(module, make(module.parameters()))


def check_prepared(make: Callable[[int], Any], port: int, rank: int, count: int) -> None:
    warnings.simplefilter("ignore")  # what these packages say of themselves
    started = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in started.items()}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    prepare = make(count)
    with pytest.MonkeyPatch.context() as patch:
        traffic = Traffic(patch)
        for how in CASES:
            module, is_masked = tanh_cell(), how.get("executor") == "checkpoint"
            expected = Joined(copy.deepcopy(module), 0.1, 7, how)
            given = how | {"strategy": how["strategy"].format(2 + rank)}
            prepared, optimizer = prepare(module, partial(torch.optim.SGD, lr=0.1))
            weights = list(prepared.parameters())
            traffic.watch(reducer_in(prepared))
            loss_fn = masked_mean if is_masked else mean_loss
            tbptt = TBPTT(prepared, loss_fn, K1, 7, optimizer, ranks="all", **given)
            sequence, state = sequence_of(rank, count, is_masked=is_masked)
            before, updates = traffic.reductions, dict(expected.updates)
            for window in tbptt.windows(sequence, state):
                if window.updated:
                    found, wanted = gradients(weights), held(updates[window.stop], weights)
                    assert relative_error(local(found), wanted) <= 1e-12, how
            assert "time_batching" not in how or window.plan.form == "batched"
            assert traffic.reductions - before == len(updates), how
            assert relative_error(local(weights), held(expected.weights, weights)) <= 1e-12, how


def reducer_in(module: nn.Module) -> nn.Module:
    found = [each for each in module.modules() if isinstance(each, DistributedDataParallel)]
    return found[0] if found else module


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("package", "make"),
    [
        ("lightning", of_fabric),
        ("lightning", of_fabric_in_shards),
        ("accelerate", of_accelerate),
    ],
)
def test_two_prepared_ranks_train_as_one_process_does(package: str, make: Any) -> None:
    pytest.importorskip(package)
    on_two_ranks(partial(check_prepared, make, free_port()))
