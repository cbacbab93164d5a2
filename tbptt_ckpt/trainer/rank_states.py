"""The states of ranks that train together, as one: what all of them hold is in it once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from tbptt_ckpt.errors import ArgumentError, TbpttError
from tbptt_ckpt.module.trees import Tree, iterate_leaves, memory_of, structure
from tbptt_ckpt.snapshot.plain import from_plain, kept_on_host, to_plain
from tbptt_ckpt.updates.ranks import RankGroup

R = TypeVar("R")
Path = tuple[Any, ...]  # keys, from the outermost


def by_first(ranks: RankGroup | None, act: Callable[[], R]) -> R:
    """What the first rank does, and alone; all get what it returns or raises."""
    if ranks is None:
        return act()
    result, problem = None, None
    if ranks.rank == 0:
        try:
            result = act()
        except TbpttError as error:
            problem = error
    result, problem = ranks.tell((result, problem))
    if problem is not None:
        raise problem
    return cast(R, result)


def joint_state(ranks: RankGroup, state: dict[str, Any]) -> dict[str, Any]:
    """This rank's state, and on the first rank what others have that it has not.

    All ranks call it together.
    """
    own = dict(_flat(to_plain(state, "the snapshot")))
    digests = {path: digest(leaf) for path, leaf in own.items()}
    first = ranks.tell(digests)
    mine = [(path, own[path]) for path in own if digests[path] != first.get(path)]
    gone = [path for path in first if path not in own]
    found = ranks.gather({"own": mine, "gone": gone})
    return {**state, "ranks": {**state["ranks"], "others": found[1:]}}


def state_of(state: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """That of one rank, out of one of all; tensors are on the host."""
    ranks = state.get("ranks") or {"others": []}
    others = ranks["others"]
    flat = dict(_flat(to_plain({**state, "ranks": {**ranks, "others": []}})))
    if rank:
        for path in others[rank - 1]["gone"]:
            del flat[tuple(path)]
        flat |= {tuple(path): leaf for path, leaf in others[rank - 1]["own"]}
    found: dict[str, Any] = from_plain(kept_on_host(_nested(flat.items())))
    return found


def saved_ranks(state: Mapping[str, Any]) -> int:
    """How many ranks a state is of.

    Raises:
        ArgumentError: It is that of one of them.
    """
    if (ranks := state.get("ranks")) is None:
        return 1
    count: int = ranks["count"]
    if len(ranks["others"]) != count - 1:
        raise ArgumentError(
            f"it is the state of rank {ranks['rank']} of {count} alone, as state_dict gave it "
            "there; go on with it as that rank of as many, or from a snapshot, which has all"
        )
    return count


def digest(tree: Tree) -> bytes:
    """Of every bit of a tree whose tensors are on the host."""
    sha = hashlib.sha256(repr(structure(tree)).encode())
    for leaf in iterate_leaves(tree):
        if isinstance(leaf, Tensor):
            dense = leaf if leaf.layout == torch.strided else leaf.to_dense()
            dense = dense.detach().cpu().resolve_conj().resolve_neg().contiguous()
            sha.update(f"{leaf.layout} {leaf.dtype} {list(leaf.shape)}".encode())
            sha.update(memory_of(dense) if dense.nbytes else b"")
        else:
            sha.update(f"{leaf!r};".encode())
    return sha.digest()


def _flat(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    if type(tree) is not dict or not tree:
        yield path, tree
        return
    for key, item in tree.items():
        yield from _flat(item, (*path, key))


def _nested(flat: Iterable[tuple[Path, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for (*outer, last), leaf in flat:
        place = found
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = leaf
    return found
