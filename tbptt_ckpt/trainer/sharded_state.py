"""What ranks hold together of a state: taken out of it to be saved, and put in as a run holds it.

A snapshot names such a tensor where its values would be. Any run takes it up: by other ranks with
other shards, by one process as a whole; and ranks take shards of what was saved as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tbptt_ckpt.engine.parts import Parts
from tbptt_ckpt.errors import SnapshotError
from tbptt_ckpt.module.trees import iterate_tensors
from tbptt_ckpt.snapshot.reading import Loaded
from tbptt_ckpt.trainer.learning_state import modules_of
from tbptt_ckpt.updates.shards import is_shard

_NAME, _DTYPE = "tbptt_ckpt.shards", "dtype"
_OWNERS = ("modules", "optimizer")  # of a state's "learning", who have such tensors

Tensors = dict[str, Tensor]
ReadShards = Callable[[Tensors], None]


def no_shards(_: Tensors) -> None:
    """Raise `SnapshotError`: a state alone has none."""
    raise SnapshotError("its shards are in a snapshot; resume from that")


def shards_of(loaded: Loaded) -> ReadShards:
    """Reads those that were saved with a state."""

    def read(tensors: Tensors) -> None:
        from tbptt_ckpt.snapshot.shards import read_shards

        read_shards(loaded.path, {file.name for file in loaded.manifest.files}, tensors)

    return read


def check_shards(optimizer: Any) -> None:
    """Raise `SnapshotError` where an optimizer's state is split otherwise than its weights."""
    for weight, state in getattr(optimizer, "state", {}).items():
        shards: list[Any] = [each for each in iterate_tensors(state) if is_shard(each)]
        for tensor in shards:
            if (tensor.shape, tensor.placements) != (weight.shape, weight.placements):
                raise SnapshotError(
                    f"the state of {type(optimizer).__name__} has a tensor {list(tensor.shape)} "
                    f"that ranks hold together otherwise than its weight {list(weight.shape)}, "
                    "and other ranks could not tell how to; use another optimizer"
                )


def without_shards(state: Mapping[str, Any]) -> tuple[dict[str, Any], Tensors]:
    """A state of a run without the tensors that ranks hold together, and these by their names."""
    found: Tensors = {}

    def taken_out(name: str, leaf: Any) -> Any:
        if not is_shard(leaf):
            return leaf
        found[name] = leaf.detach()
        return {_NAME: name, _DTYPE: leaf.dtype}

    learning = state["learning"]
    owners = {owner: _changed(learning[owner], owner, taken_out) for owner in _OWNERS}
    return {**state, "learning": {**learning, **owners}}, found


def as_held(parts: Parts, learning: Mapping[str, Any], read: ReadShards) -> dict[str, Any]:
    """What was saved as "learning", with tensors as this run holds its own.

    `read` fills tensors, by the names that stand for them.

    Raises:
        SnapshotError: It names what cannot be read, or belongs to nothing.
    """
    wanted: Tensors = {}
    likes = {f"optimizer.state.{n}": each for n, each in enumerate(parts.updater.optimized())}
    for name, module in modules_of(parts).items():
        likes |= {f"modules.{name}.state.{key}": v for key, v in module.state_dict().items()}

    def held(name: str, leaf: Any) -> Any:
        like = likes.get(name) if name in likes else likes.get(name.rpartition(".")[0])
        if _is_named(leaf):
            if not isinstance(like, Tensor) or not isinstance(leaf[_DTYPE], torch.dtype):
                raise SnapshotError(f"it has shards of {name}, which nothing here has")
            device = like.device if is_shard(like) else "cpu"
            tensor = torch.empty_like(like.detach(), dtype=leaf[_DTYPE], device=device)
            return wanted.setdefault(leaf[_NAME], tensor)
        is_whole = isinstance(leaf, Tensor) and not is_shard(leaf)
        if isinstance(like, Tensor) and is_shard(like) and is_whole and leaf.shape == like.shape:
            return _own_shard(leaf.to(like.device), like)
        return leaf

    owners = {owner: _changed(learning[owner], owner, held) for owner in _OWNERS}
    if wanted:
        read(wanted)
    return {**learning, **owners}


def _own_shard(whole: Tensor, like: Any) -> Tensor:
    """This rank's; nothing is sent, since all ranks have the whole."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def _is_named(leaf: Any) -> bool:
    return isinstance(leaf, dict) and leaf.keys() == {_NAME, _DTYPE}


def _changed(tree: Any, name: str, change: Callable[[str, Any], Any]) -> Any:
    """The same dicts, with other leaves; a leaf is known by the keys that lead there."""
    if type(tree) is not dict or _is_named(tree):
        return change(name, tree)
    return {key: _changed(item, f"{name}.{key}", change) for key, item in tree.items()}
