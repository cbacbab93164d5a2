"""How many bytes a device has left for this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch

from tbptt_ckpt.arguments import AnyPath, checked, refused
from tbptt_ckpt.devices import accelerator, check_usable
from tbptt_ckpt.errors import ArgumentError


@checked
def free_memory(device: Device | None = None, *, root: AnyPath = "/") -> int:
    """Bytes that can still be allocated on a device.

    On an accelerator: what the driver reports as free, and what torch's allocator has
    reserved without using it, fragments among them; together no more than
    `set_per_process_memory_fraction` leaves to this process. On the CPU (default): the
    least of the machine's available RAM and, for every control group this process is in
    (v1 and v2, parents included), its limit minus its usage. Clean file pages that are about
    to be dropped anyway do not count as usage; without that, reading a large file would seem
    to fill the container.

    Args:
        device: The device; None is the CPU.
        root: Where /proc and /sys are looked for.

    Raises:
        ArgumentError: A device that this machine does not have.
    """
    where = accelerator_or_cpu(device)
    if where.type != "cpu":
        return _free_on_accelerator(where)
    left = [limit - used for limit, used in _group_memory(Path(root))]
    return max(0, min([psutil.virtual_memory().available, *left]))


def reserved_memory(device: torch.device) -> int | None:
    """Bytes that torch's allocator has taken from an accelerator; None on the CPU."""
    return None if device.type == "cpu" else torch.accelerator.memory_reserved(device)


def check_device(name: str, value: Any, alternative: str | None = None) -> None:
    """Raise `ArgumentError` unless `value` is a device that this machine has, or "meta"."""
    try:
        where = torch.device(value)
    except (RuntimeError, TypeError, ValueError):
        words = "a device such as 'cpu' or 'cuda:0'"
        raise refused(name, value, words, alternative) from None
    if where.type != "meta":
        accelerator_or_cpu(where)


Device = Annotated[torch.device | str, check_device]


def accelerator_or_cpu(device: torch.device | str | None) -> torch.device:
    """The device with its index filled in; None is the CPU."""
    where = torch.device("cpu" if device is None else device)
    if where.type == "cpu":
        return torch.device("cpu")
    check_usable(f"device={str(device)!r}: tensors", where)
    here = accelerator()
    if here is None or here.type != where.type:
        has = "cpu" if here is None else f"cpu and {here.type}"
        raise ArgumentError(f"device={str(device)!r} is not on this machine, which has {has}")
    index = torch.accelerator.current_device_index() if where.index is None else where.index
    if index >= (count := torch.accelerator.device_count()):
        indices = "index 0 alone" if count == 1 else f"indices 0 to {count - 1}"
        raise ArgumentError(
            f"device={str(device)!r} is not on this machine, whose {where.type} has {indices}"
        )
    return torch.device(where.type, index)


def _free_on_accelerator(device: torch.device) -> int:
    free, total = torch.accelerator.get_memory_info(device)
    reserved = torch.accelerator.memory_reserved(device)
    # Torch's allocator refuses what would take it above this share of the device.
    fraction = getattr(torch.get_device_module(device), "get_per_process_memory_fraction", None)
    allowed = total if fraction is None else int(fraction(device) * total)
    growth = max(0, min(free, allowed - reserved))
    return growth + reserved - torch.accelerator.memory_allocated(device)


def _group_memory(root: Path) -> Iterator[tuple[int, int]]:
    """Pairs (limit, usage) in bytes of every control group that bounds this process."""
    for folder in _group_folders(root):
        for limit_name, usage_name, cache_key in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.high", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, used = _number(folder / limit_name), _number(folder / usage_name)
            if limit is not None and used is not None:
                yield limit, used - (_number(folder / "memory.stat", cache_key) or 0)


def _group_folders(root: Path) -> Iterator[Path]:
    """Folders of this process's memory control groups, each with all its parents.

    Inside a container the path in /proc/self/cgroup may be the host's while the mount
    shows the container's own group at its top; the top is always among the parents.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    groups = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mounts = [groups, groups / "unified"]
        elif "memory" in controllers.split(","):
            mounts = [groups / "memory"]
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for mount in mounts:
            yield from (mount.joinpath(*parts[:depth]) for depth in range(len(parts) + 1))


def _number(file: Path, key: str = "") -> int | None:
    """The number in a file, or behind a key in it; None where there is none, as in "max"."""
    try:
        words = file.read_text().split()
        return int(words[words.index(key) + 1 if key else 0])
    except (OSError, ValueError, IndexError):
        return None
