"""Modules under `fully_shard`, whose weights ranks hold together and gather for a window.

NOTE [Gathered once]
Ranks run windows of different plans, so that none may gather weights within one: all of them are
gathered as a window begins, and stay so. Leaves add to the gradients of gathered weights, which
nobody sends. At an update one pass in which nothing is computed, with the module's setters for a
last backward, has them reduced and the weights freed; what the update changes are shards.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.module.inside import is_a

_METHOD = "_tbptt_ckpt_hands_through"


class Shards:
    """Those of a run's modules, found once.

    Attributes:
        gathered: Weights as leaves find them, from the first window on; the same tensors in all.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules: list[Any] = [m for m in modules if is_a(m, "torch", "FSDPModule")]
        inner = {id(each) for m in self._modules for each in m.modules() if each is not m}
        self._roots = [module for module in self._modules if id(module) not in inner]
        self.gathered: list[Tensor] = []
        self._whole: set[int] = set()  # weights that are not sharded, by their identity
        self._places: dict[int, int] = {}  # of sharded ones, by theirs, in `gathered`
        self._awaited: dict[int, Tensor | None] = {}  # gradients until something is gathered

    @property
    def is_any(self) -> bool:
        """Whether there are some."""
        return bool(self._modules)

    def check(self, count: int) -> None:
        """Raise `ArgumentError` unless `count` ranks can be given a window's gradient at once.

        Weights are shards afterwards.
        """
        for module in self._modules:
            module.reshard()
        for module in self._modules:
            policy = module._get_fsdp_state()._mp_policy
            if policy.param_dtype or policy.reduce_dtype:
                raise ArgumentError(
                    "ranks='all' does not fit module: fully_shard(mp_policy=...) keeps gradients "
                    "of several backwards where nobody can weigh them; leave mp_policy out "
                    "(TBPTT has autocast_dtype)"
                )
            for name, weight in module.named_parameters():
                size = weight.device_mesh.size() if is_shard(weight) else count
                if size != count:
                    raise ArgumentError(
                        f"ranks='all' does not fit module: the mesh of {name} has {size} ranks of "
                        f"{count}, and all train together; make the mesh of all"
                    )
            self._whole |= {id(w) for w in module.parameters() if not is_shard(w)}
        shards = {id(w): w for m in self._roots for w in m.parameters() if is_shard(w)}
        self._places = {key: place for place, key in enumerate(shards)}

    def begin(self) -> None:
        """A window begins: gather weights as they are now, and send nothing within.

        Raises:
            ArgumentError: A weight is split beyond that, as by tensor parallelism.
        """
        for root in self._roots:
            root.set_reshard_after_forward(False)
        self._set(is_last=False)
        for module in self._modules:
            module.reshard()
            module.unshard()
        found = {id(w): w for root in self._roots for w in root.parameters()}
        self.gathered = [weight for key, weight in found.items() if key not in self._whole]
        if any(map(is_shard, self.gathered)):
            raise ArgumentError(
                "ranks='all' does not fit module: its weights are split over ranks by other means "
                "than fully_shard, and those ranks must have the same lanes"
            )

        for key, grad in self._awaited.items():
            self.gathered[self._places[key]].grad = grad
        self._awaited = {}

    def whole(self, weight: Tensor) -> Tensor:
        """What a weight was gathered in; itself where that is not known yet, or it is no shard."""
        place = self._places.get(id(weight))
        return weight if place is None or not self.gathered else self.gathered[place]

    def grad_of(self, weight: Tensor) -> Tensor | None:
        """What a window leaves for the next one of its group; of a shard, of the whole weight."""
        if (place := self._places.get(id(weight))) is None:
            return weight.grad
        return self.gathered[place].grad if self.gathered else self._awaited.get(id(weight))

    def set_grad(self, weight: Tensor, grad: Tensor | None) -> None:
        """Put back what `grad_of` gave."""
        if (place := self._places.get(id(weight))) is None:
            weight.grad = grad
        elif self.gathered:
            self.gathered[place].grad = grad
        else:
            self._awaited[id(weight)] = grad

    def reduce(self) -> None:
        """Give shards the mean over ranks of the gradients that gathered weights have."""
        self._set(is_last=True)
        for root in self._roots:
            with torch.enable_grad():
                ticket = torch.zeros((), device=self.gathered[0].device, requires_grad=True)
                handed = _handed_through(root, ticket)
            torch.autograd.backward(handed)

    def _set(self, *, is_last: bool) -> None:
        for root in self._roots:
            root.set_requires_gradient_sync(is_last)
            root.set_reshard_after_backward(is_last)
            root.set_is_last_backward(is_last)


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class that a user made it of; `fully_shard` makes another one of that."""
    own = type(module)
    return own.__mro__[2] if is_a(module, "torch", "FSDPModule") else own


def is_shard(weight: object) -> bool:
    """Whether ranks hold it together."""
    return is_a(weight, "torch", "DTensor")


def local_part(weight: Any) -> Tensor:
    """What this rank holds of it."""
    part: Tensor = weight.to_local() if is_shard(weight) else weight
    return part


def shard_of(weight: Any) -> int:
    """Which of its shards this rank holds; ranks that give the same number hold the same."""
    number = 0
    if is_shard(weight):
        mesh = weight.device_mesh
        places = zip(weight.placements, mesh.get_coordinate(), mesh.shape, strict=True)
        for placement, coordinate, size in places:
            number = number * size + (0 if placement.is_replicate() else coordinate)
    return number


def by_kind(tensors: Iterable[Any]) -> list[list[Any]]:
    """Shards, and others, each in their order: torch has no operation on lists of both."""
    kinds: dict[bool, list[Any]] = {}
    for tensor in tensors:
        kinds.setdefault(is_shard(tensor), []).append(tensor)
    return list(kinds.values())


def total_norm(grads: Iterable[Any]) -> Tensor:
    """Of all of them together, over all ranks; these ask for it together where there are shards."""
    norms: list[Any] = [torch.nn.utils.get_total_norm(alike) for alike in by_kind(grads)]
    whole = [norm.full_tensor() if is_shard(norm) else norm for norm in norms]
    return whole[0] if len(whole) == 1 else torch.nn.utils.get_total_norm(whole)


def _handed_through(module: Any, ticket: Tensor) -> Tensor:
    """A forward of the wrapper alone: hooks of others would take it for one of the module."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    vars(module)[_METHOD] = torch.clone
    try:
        register_fsdp_forward_method(module, _METHOD)
        handed: Tensor = getattr(module, _METHOD)(ticket)
    finally:
        del vars(module)[_METHOD]
    return handed
