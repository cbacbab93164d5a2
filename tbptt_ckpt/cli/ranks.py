"""`tbptt-ckpt train` in processes that torchrun has started, which train together."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from tbptt_ckpt import SharedState
from tbptt_ckpt.cli.devices import find_device
from tbptt_ckpt.cli.task import Task
from tbptt_ckpt.cli.train.config import TrainingConfig
from tbptt_ckpt.data.lane_share import lane_range, own_lanes, own_part
from tbptt_ckpt.errors import ArgumentError, TbpttWarning
from tbptt_ckpt.module.recurrence import recognise

USER_ERROR, INTERRUPTED = 2, 130


@contextmanager
def as_rank(config: TrainingConfig) -> Iterator[TrainingConfig]:
    """While entered, one of the ranks if torchrun has started this process; what it is to do.

    What ends the run is told once: ranks that it ends as well, or after that, end silently.

    Raises:
        ArgumentError: A device that all ranks of a machine would use.
    """
    env = os.environ
    if "TORCHELASTIC_RUN_ID" not in env:
        yield config
        return
    rank, store = int(env["RANK"]), _own_store()
    try:
        device = _own_device(config.device)
        backend = dist.get_default_backend_for_device(device)
        dist.init_process_group(backend, store=store, rank=rank, world_size=int(env["WORLD_SIZE"]))
        if rank:
            warnings.simplefilter("ignore", TbpttWarning)
        yield replace(config, device=str(device))
    except BaseException as error:
        if _is_told(store):
            raise SystemExit(_code_of(error)) from error
        raise
    dist.destroy_process_group()


def is_first() -> bool:
    """Whether this process says what there is to say."""
    return not dist.is_initialized() or dist.get_rank() == 0


def share_of(task: Task) -> Task:
    """The task with the lanes of this rank only; as it is where there are no ranks."""
    if not dist.is_initialized():
        return task
    work, first = task.workload, task.workload.init_state
    if isinstance(first, SharedState):
        own = lane_range(first.lanes)
        first = SharedState(first.state, own.stop - own.start)
    else:
        dim = recognise(work.module, work.per_step, work.time_dim, work.lane_dim).lane_dim
        first = own_part(first, dim)
    held_out = None if task.held_out is None else own_lanes(task.held_out)
    work = replace(work, source=own_lanes(work.source), init_state=first)
    return replace(task, workload=work, held_out=held_out)


def _own_store() -> Any:
    """That of this attempt: attempts share one, and would find addresses of the one before."""
    env = os.environ
    hosts = env["RANK"] == "0" and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    c10d: Any = dist  # its stubs leave stores out
    store = c10d.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=hosts)
    return c10d.PrefixStore(f"attempt {env['TORCHELASTIC_RESTART_COUNT']}", store)


def _own_device(name: str | None) -> torch.device:
    """The accelerator of the rank's number on its machine, or the CPU."""
    device, local = find_device(name), int(os.environ["LOCAL_RANK"])
    if device.type == "cpu":
        return device
    if device.index is not None and int(os.environ["LOCAL_WORLD_SIZE"]) > 1:
        raise ArgumentError(
            f"--device {name} would be that of all ranks; write --device {device.type}, of which "
            "each takes the one of its number"
        )
    if device.index is None:
        device = find_device(f"{device.type}:{local}")
    torch.accelerator.set_device_index(device.index)
    return device


def _is_told(store: Any) -> bool:
    """Whether another rank has told what ended the run; if not, this one does."""
    try:
        return bool(store.add("told", 1) > 1)
    except RuntimeError:  # it is gone, with who told it
        return True


def _code_of(error: BaseException) -> int:
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return INTERRUPTED if isinstance(error, KeyboardInterrupt) else USER_ERROR
