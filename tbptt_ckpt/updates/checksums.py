"""Whether ranks hold the same weights, bit by bit; of shards, whether their copies are the same."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from tbptt_ckpt.updates.shards import local_part, shard_of


def checksums_of(weights: Iterable[Tensor]) -> Tensor:
    """[weights, 2]: which shard this rank has of each, and that one's checksum."""
    rows = [(shard_of(weight), _checksum(local_part(weight))) for weight in weights]
    return torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(-1, 2)


def differing(checksums: Tensor) -> list[tuple[int, int, int]]:
    """From those of all ranks, [ranks, weights, 2]: (rank, rank before it, place of a weight)."""
    rows, found = checksums.tolist(), list[tuple[int, int, int]]()
    for place in range(checksums.shape[1]):
        first: dict[int, int] = {}  # rank that has a shard
        for rank, row in enumerate(rows):
            other = first.setdefault(row[place][0], rank)
            if row[place] != rows[other][place]:
                found.append((rank, other, place))
    return found


def _checksum(tensor: Tensor) -> int:
    """Of a tensor's bits."""
    whole = tensor.detach().cpu().contiguous().reshape(-1)
    return zlib.crc32(whole.view(torch.uint8).numpy().data)


def named_weights(owners: Iterable[tuple[str, Any]], others: Iterable[Tensor]) -> dict[str, Tensor]:
    """Weights of modules by their names, and the optimizer's others by their places."""
    found = {
        id(weight): (f"{owner}.{name}", weight)
        for owner, module in owners
        if isinstance(module, torch.nn.Module)
        for name, weight in module.named_parameters()
    }
    rest = {id(weight): weight for weight in others if id(weight) not in found}
    named = dict(found.values())
    return named | {f"parameter {n} of optimizer": each for n, each in enumerate(rest.values())}
