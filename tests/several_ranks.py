"""Two processes over gloo, or more, that run the same check."""

from __future__ import annotations

import socket
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist

Check = Callable[[int, int], None]  # of a rank, of so many


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def on_ranks(check: Check, count: int) -> None:
    """Run a check, which can be pickled, on so many; raises what one of them raises."""
    torch.multiprocessing.spawn(_joined, (count, free_port(), check), nprocs=count)


def on_two_ranks(check: Check) -> None:
    """The same on both."""
    on_ranks(check, 2)


def _joined(rank: int, count: int, port: int, check: Check) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=count)
    check(rank, count)
    dist.destroy_process_group()
