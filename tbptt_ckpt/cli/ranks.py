"""Commands in processes that torchrun has started: each has lanes of its own, and one speaks."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from tbptt_ckpt import SharedState
from tbptt_ckpt.cli.devices import find_device
from tbptt_ckpt.cli.model_options import ModelOptions
from tbptt_ckpt.cli.task import Task
from tbptt_ckpt.data.lane_share import lane_range, own_lanes, own_part
from tbptt_ckpt.errors import ArgumentError, TbpttWarning
from tbptt_ckpt.module.recurrence import recognise

USER_ERROR, INTERRUPTED = 2, 130

Config = TypeVar("Config", bound=ModelOptions)
Place = tuple[int, int]  # a rank, of so many


@contextmanager
def as_rank(config: Config) -> Iterator[Config]:
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


def own_place() -> Place | None:
    """Which rank this process is, of how many; None where there are no ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else None


def told_by_all(thing: object) -> list[Any] | None:
    """What all ranks give, by rank; None where there are no ranks."""
    if not dist.is_initialized():
        return None
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, thing)
    return found


def share_of(task: Task, place: Place | None) -> Task:
    """The task with the lanes of one rank only; as it is where there are no ranks."""
    if place is None:
        return task
    (rank, ranks), work, first = place, task.workload, task.workload.init_state
    lanes = partial(lane_range, rank=rank, ranks=ranks)
    if isinstance(first, SharedState):
        own = lanes(first.lanes)
        first = SharedState(first.state, own.stop - own.start)
    else:
        dim = recognise(work.module, work.per_step, work.time_dim, work.lane_dim).lane_dim
        first = own_part(first, dim, lanes)
    source, held_out = (
        None if whole is None else own_lanes(whole, rank=rank, ranks=ranks)
        for whole in (work.source, task.held_out)
    )
    work = replace(work, source=source, init_state=first)
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
