"""Places where a module keeps things on itself: attributes and buffers, weights aside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tbptt_ckpt.module.attributes import Attributes
from tbptt_ckpt.module.inside import OF_EVERY_MODULE
from tbptt_ckpt.module.trees import Tree, iterate_leaves, map_tensors, structure, tensors_of

_PLAIN = (int, float, bool, str, bytes, complex, type(None))
ABSENT: Any = type(None)  # what a place holds where there is none; its own copy, as classes are


class Place(NamedTuple):
    """An attribute or buffer of a module inside, by the names that lead to it."""

    path: str
    name: str
    is_buffer: bool

    def __str__(self) -> str:
        return f"{self.path}.{self.name}" if self.path else self.name

    def get(self, module: nn.Module) -> Tree:
        """What stands there, or `ABSENT`."""
        return self.holder(module).get(self.name, ABSENT)

    def put(self, module: nn.Module, value: Tree) -> None:
        """Have it stand there, past what assignments of the module's class do."""
        if value is not ABSENT:
            self.holder(module)[self.name] = value
        elif self.holder(module).pop(self.name, ABSENT) is not ABSENT and self.is_buffer:
            module.get_submodule(self.path)._non_persistent_buffers_set.discard(self.name)

    def holder(self, module: nn.Module) -> dict[str, Any]:
        """The dict that has it, by its name."""
        owner = module.get_submodule(self.path)
        return owner._buffers if self.is_buffer else vars(owner)


class Held:
    """What a place held, to compare; tensors by which they are and how often they were written."""

    def __init__(self, value: Tree) -> None:
        self.value = map_tensors(lambda tensor: tensor, value)  # in containers of its own
        self.tensors = [t for t in tensors_of(value) if not isinstance(t, nn.Parameter)]
        self._versions = [tensor._version for tensor in self.tensors]

    def is_same(self, other: Held) -> bool:
        """Whether nothing has changed between the two."""
        mine, others = list(iterate_leaves(self.value)), list(iterate_leaves(other.value))
        return (
            structure(self.value) == structure(other.value)
            and all(map(_is_same, mine, others))
            and self._versions == other._versions
        )

    def is_rewritten_in(self, later: Held) -> bool:
        """Whether a tensor is still there, and was written into."""
        known = {id(t): version for t, version in zip(self.tensors, self._versions, strict=True)}
        now = zip(later.tensors, later._versions, strict=True)
        return any(known.get(id(tensor), version) != version for tensor, version in now)


def _is_same(then: object, now: object) -> bool:
    return then is now or (type(then) is type(now) and isinstance(then, _PLAIN) and then == now)


def places_in(module: nn.Module) -> Iterator[Place]:
    """All that there are at present."""
    for path, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):  # keeps what it has out of sight
            continue
        yield from (Place(path, name, False) for name in vars(part) if name not in OF_EVERY_MODULE)
        yield from (Place(path, name, True) for name in part._buffers)


def record(module: nn.Module) -> dict[Place, Held]:
    """What all places hold."""
    return {place: Held(place.get(module)) for place in places_in(module)}


def let_go_of_graphs(module: nn.Module) -> None:
    """Detach what a step has left in a module that was used already."""
    for place in list(places_in(module)):
        value = place.get(module)
        if any(tensor.grad_fn is not None for tensor in tensors_of(value)):
            place.put(module, map_tensors(without_graph, value))


def without_graph(tensor: Tensor) -> Tensor:
    """The tensor without what it was made of; one that learns by itself stays as it is."""
    return tensor.detach() if tensor.grad_fn is not None else tensor


@contextmanager
def on_copies(module: nn.Module) -> Iterator[None]:
    """While entered, attributes and buffers hold copies; everything is put back."""
    attributes = Attributes(module)
    known = {place: place.get(module) for place in places_in(module)}
    copies: dict[int, Tensor] = {}  # one tensor in two places is one in the copy

    def copied(tensor: Tensor) -> Tensor:
        if isinstance(tensor, nn.Parameter):
            return tensor
        return copies.setdefault(id(tensor), tensor.detach().clone())

    try:
        for place, value in known.items():
            if tensors_of(value):
                place.put(module, map_tensors(copied, value))
        yield
    finally:
        attributes.put_back()
        for place in list(places_in(module)):
            place.put(module, known.get(place, ABSENT))
