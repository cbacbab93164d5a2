"""Nested recurrent states: any tuples, lists, dicts, named tuples and dataclasses of tensors."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import random
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tbptt_ckpt.errors import ArgumentError

_SEARCHED = 10_000  # objects inside one that passes through

Tree = Any  # a tensor, a container of trees, or anything else, which passes through


def map_tensors(
    function: Callable[[Any], Any], tree: Tree, kind: type | tuple[type, ...] = Tensor
) -> Tree:
    """The same tree with `function` applied to every tensor, or to every leaf of a `kind`."""
    if isinstance(tree, kind):
        return function(tree)
    if type(tree) is tuple:  # most states are: no generator for them
        return tuple([map_tensors(function, item, kind) for item in tree])
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tensors(function, item, kind) for item in tree))
    if isinstance(tree, tuple | list):
        return type(tree)(map_tensors(function, item, kind) for item in tree)
    if isinstance(tree, dict):
        mapping = copy.copy(tree)
        mapping.update((key, map_tensors(function, item, kind)) for key, item in tree.items())
        return mapping
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        mapped = copy.copy(tree)
        for field in dataclasses.fields(tree):
            item = map_tensors(function, getattr(tree, field.name), kind)
            object.__setattr__(mapped, field.name, item)  # frozen dataclasses are states too
        return mapped
    return tree


# What a step may write into, or draw from, in a state, besides tensors.
_WRITTEN = (
    *(np.ndarray, array, bytearray, deque, set, random.Random, torch.Generator),
    *(np.random.Generator, np.random.RandomState, np.random.BitGenerator),
)


def _map_state(function: Callable[[Tensor], Tensor], state: Tree) -> Tree:
    """`map_tensors` with copies of the arrays and generators of a state."""
    if isinstance(state, Tensor):
        return function(state)
    if type(state) is tuple:
        tensors = [item for item in state if isinstance(item, Tensor)]
        if len(tensors) == len(state):
            return tuple([function(item) for item in tensors])
    memo: dict[int, Any] = {}  # one generator in two places is one in the copy

    def mapped(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        is_constant = isinstance(leaf, np.ndarray) and not leaf.flags.writeable
        if is_constant or isinstance(leaf, random.SystemRandom):  # which has no state
            return leaf
        return copy.deepcopy(leaf, memo)

    return map_tensors(mapped, state, (Tensor, *_WRITTEN))


def copy_containers(state: Tree) -> Tree:
    """The same tensors in new containers, for a module that writes into its state."""
    return _map_state(lambda tensor: tensor, state)


def iterate_leaves(tree: Tree) -> Iterator[Any]:
    """Everything that is no container, in the order `map_tensors` visits it."""
    inside = None if isinstance(tree, Tensor) else _children(tree)
    if inside is None:
        yield tree
        return
    for item in inside:
        yield from iterate_leaves(item)


def _children(tree: Tree) -> Iterable[Tree] | None:
    """What a container holds; None for what is none."""
    if isinstance(tree, tuple | list):
        return tree
    if isinstance(tree, dict):
        return tree.values()
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return [getattr(tree, field.name) for field in dataclasses.fields(tree)]
    return None


def iterate_tensors(tree: Tree) -> Iterator[Tensor]:
    """Every tensor of a tree, in the order `map_tensors` visits them."""
    return (leaf for leaf in iterate_leaves(tree) if isinstance(leaf, Tensor))


def tensors_of(tree: Tree) -> list[Tensor]:
    """Every tensor of a tree."""
    if isinstance(tree, Tensor):
        return [tree]
    if type(tree) is tuple:  # most states are, of tensors alone
        found = [item for item in tree if isinstance(item, Tensor)]
        if len(found) == len(tree):
            return found
    return list(iterate_tensors(tree))


def replace_tensors(tree: Tree, tensors: list[Any]) -> Tree:
    """The same tree with its tensors replaced, in the order of `tensors_of`."""
    remaining = iter(tensors)
    return map_tensors(lambda _: next(remaining), tree)


def join_trees(join: Callable[[list[Tensor]], Tensor], trees: Sequence[Tree]) -> Tree:
    """One tree of several that are nested alike: each tensor is made of those in its place."""
    columns = zip(*map(tensors_of, trees), strict=True)
    return replace_tensors(trees[0], [join(list(column)) for column in columns])


def structure(tree: Tree) -> object:
    """A comparable description of a tree's containers; tensors are all alike, lists are tuples."""
    if isinstance(tree, Tensor):
        return "tensor"
    inside, name = _children(tree), type(tree).__name__
    if inside is None:
        return name
    if isinstance(tree, dict):
        return (name, *zip(tree, map(structure, inside), strict=True))
    is_plain = isinstance(tree, tuple | list) and not hasattr(tree, "_fields")
    return ("sequence" if is_plain else name, *map(structure, inside))


def check_no_hidden_tensors(state: Tree) -> None:
    """Raise `ArgumentError` where an object that passes through leads to tensors of its own.

    No gradient would cross a segment boundary in them, and nobody would be told.
    """
    if type(state) is tuple and all(isinstance(item, Tensor) for item in state):
        return
    for leaf in iterate_leaves(state):
        if not isinstance(leaf, Tensor) and _leads_to_tensor(leaf):
            raise ArgumentError(
                f"the state holds a {type(leaf).__name__} with tensors in it, which are not found "
                "there; use tuples, lists, dicts, named tuples or dataclasses"
            )


def _leads_to_tensor(owner: object) -> bool:
    """Whether attributes and containers lead to a tensor, at any depth."""
    left, seen = [owner], set()
    for item in left:  # grows
        if isinstance(item, Tensor):
            return True
        if isinstance(item, nn.Module | type | ModuleType) or id(item) in seen:
            continue
        seen.add(id(item))
        inside = slots_of(item)
        inside += getattr(item, "__dict__", {}).values()
        inside += item.values() if isinstance(item, dict) else ()
        inside += item if isinstance(item, deque | Set | list | tuple) else ()
        left += inside[: _SEARCHED - len(left)]
    return False


def slots_of(owner: object) -> list[Any]:
    """What stands in the slots of an object."""
    slots = (vars(kind).get("__slots__", ()) for kind in type(owner).__mro__)
    names = [name for each in slots for name in ([each] if isinstance(each, str) else each)]
    return [getattr(owner, name, None) for name in names]


def is_differentiable(tensor: Tensor) -> bool:
    """Whether a gradient with respect to the tensor can exist."""
    return tensor.is_floating_point() or tensor.is_complex()


def detach_state(state: Tree) -> Tree:
    """The state without its graph, owning no more memory than its values need."""

    def compact(tensor: Tensor) -> Tensor:
        detached = tensor.detach()
        # A state that is a slice of a segment's output would keep all of the output alive.
        return detached.clone() if keeps_more_than_its_values(detached) else detached

    return _map_state(compact, state)


def keeps_more_than_its_values(tensor: Tensor) -> bool:
    """Whether a tensor keeps more memory alive than its own values need."""
    return tensor.untyped_storage().nbytes() > tensor.nbytes


def state_as_leaves(state: Tree) -> Tree:
    """The state as new autograd leaves that collect gradients."""
    return _map_state(
        lambda t: t.detach().requires_grad_() if is_differentiable(t) else t.detach(), state
    )


def norms_of_change(recomputed: Tree, recorded: Tree) -> Iterator[tuple[Tensor, Tensor]]:
    """`||recomputed - recorded||_2` and `||recorded||_2` of each floating tensor."""
    with torch.no_grad():
        for new, old in zip(tensors_of(recomputed), tensors_of(recorded), strict=True):
            if is_differentiable(old):
                yield torch.linalg.vector_norm(new - old), torch.linalg.vector_norm(old)


def checksum(tensor: Tensor) -> int:
    """A number that changes with any bit of a strided tensor on the CPU.

    Its memory is read in place. `numpy()` would mark the storage as one that numpy shares, and
    a meter leaves those out.
    """
    if not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
        tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return zlib.crc32(memory_of(tensor)) if tensor.nbytes else 0


def memory_of(tensor: Tensor) -> ctypes.Array[ctypes.c_char]:
    """The memory of a contiguous tensor on the CPU, in place."""
    return _bytes_type(tensor.nbytes).from_address(tensor.data_ptr())


def bytes_of(tensor: Tensor) -> bytes:
    """The memory of a contiguous tensor on the CPU."""
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes)


@lru_cache(maxsize=256)
def _bytes_type(num_bytes: int) -> type[ctypes.Array[ctypes.c_char]]:
    return ctypes.c_char * num_bytes
