"""The states of ranks that train together, as one: what all of them hold is in it once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from tbptt_ckpt.errors import ArgumentError, RankError, SnapshotError, TbpttError
from tbptt_ckpt.module.trees import Tree, iterate_leaves, memory_of, structure
from tbptt_ckpt.snapshot.plain import from_plain, kept_on_host, to_plain
from tbptt_ckpt.updates.ranks import RankGroup

R = TypeVar("R")
S = TypeVar("S")
Path = tuple[Any, ...]  # keys, from the outermost


def by_first(ranks: RankGroup | None, act: Callable[[], R]) -> R:
    """What the first rank does, and alone; all get what it returns or raises."""
    return led_by_first(ranks, lambda _: act(), lambda _: None)


def led_by_first(
    ranks: RankGroup | None, act: Callable[[Callable[[Any], S]], R], joint: Callable[[Any], S]
) -> R:
    """What the first rank does, where all do `joint` with what it calls that with.

    All get what it returns or raises. Of `joint` all ranks raise something, or none.
    """
    if ranks is None:
        return act(joint)
    if ranks.rank:
        while True:
            is_done, result, problem = ranks.tell(None)
            if is_done:
                break
            with suppress(TbpttError, OSError):  # the first rank has one as well
                joint(result)
    else:

        def lead(given: Any) -> S:
            ranks.tell((False, given, None))
            return joint(given)

        result = problem = None
        try:
            result = act(lead)
        except TbpttError as error:
            problem = error
        _, result, problem = ranks.tell((True, result, problem))
    if problem is not None:
        raise problem
    return cast(R, result)


@contextmanager
def on_all(ranks: RankGroup | None) -> Iterator[None]:
    """What all do within fails on all of them where it fails on one."""
    if ranks is None:
        yield
        return
    try:
        yield
    except RankError:
        raise  # they are not all there
    except Exception as error:
        line = f"rank {ranks.rank}: {type(error).__name__}: {error}"
        is_told = isinstance(error, TbpttError | OSError)
        ranks.exchange(error if is_told else SnapshotError(line))
        raise
    for problem in filter(None, ranks.exchange(None)):
        raise problem


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
