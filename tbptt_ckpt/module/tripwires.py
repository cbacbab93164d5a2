"""Values that a module may keep, with an error where a gradient would have to pass through them.

What a module keeps on itself from one run of steps to the next has the graph of a run that will be
recomputed, or is over. Most of it nobody looks at again: a last attention map, a shadow of the
state. Whether somebody does shows in the backward, where a tripwire is then in the way.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tbptt_ckpt.errors import TbpttError
from tbptt_ckpt.module.inside import OF_EVERY_MODULE
from tbptt_ckpt.module.trees import map_tensors, tensors_of

IN_THE_STATE = (
    "what a module carries from step to step with its gradient belongs in the state it returns; "
    "lifted(module, input), of tbptt_ckpt.module, puts it there"
)
_SEARCHED = 1000  # containers and objects, and items of one; longer ones hold data


class _Tripwire(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, where: str) -> Tensor:
        ctx.where = where
        return tensor.data  # no view: it may be written into

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise TbpttError(
            f"the module read {ctx.where}, which it had kept from an earlier step with its graph; "
            + IN_THE_STATE
        )


def tripwire(tensor: Tensor, where: str) -> Tensor:
    """The same values without their graph; `TbpttError` if a gradient arrives."""
    wired: Tensor = _Tripwire.apply(tensor.detach().requires_grad_(), where)  # type: ignore[no-untyped-call]
    return wired


def is_tripwire(tensor: Tensor) -> bool:
    """Whether this is one."""
    return isinstance(tensor.grad_fn, _Tripwire._backward_cls)


class KeptGraphs:
    """Tensors with a graph that a module keeps in attributes, in containers and objects there too.

    Those that are there already, such as weights that were computed beforehand, are let be.
    """

    def __init__(self, module: object) -> None:
        self._module = module
        self._known: list[Tensor] = []
        self._known = [t for holder, key, _ in self._places() for t in tensors_of(holder[key])]

    def wire(self) -> None:
        """Put tripwires for all that have come since."""
        for holder, key, where in list(self._places()):
            holder[key] = map_tensors(functools.partial(self._wired, where=where), holder[key])

    def _wired(self, tensor: Tensor, where: str) -> Tensor:
        return tripwire(tensor, where) if self._is_new(tensor) else tensor

    def _is_new(self, tensor: Tensor) -> bool:
        has_graph = tensor.grad_fn is not None and not is_tripwire(tensor)
        return has_graph and all(tensor is not known for known in self._known)

    def _places(self) -> Iterator[tuple[Any, Any, str]]:
        """Container, key and name of each tensor with a graph, or tuple of such."""
        parts = self._module.modules() if isinstance(self._module, nn.Module) else ()
        left: list[tuple[Any, str]] = [(vars(part), type(part).__name__) for part in parts]
        seen = {id(holder) for holder, _ in left}
        for holder, owner in left:  # grows
            keys = range(len(holder)) if isinstance(holder, list) else list(holder)
            for key in keys:
                item, where = holder[key], f"{owner}.{key}" if isinstance(key, str) else owner
                if key in OF_EVERY_MODULE or isinstance(item, nn.Module | type):
                    continue
                if isinstance(item, Tensor | tuple):
                    if any(map(self._is_new, tensors_of(item))):
                        yield holder, key, where
                    continue
                inside = item if isinstance(item, dict | list) else getattr(item, "__dict__", None)
                is_searched = len(seen) < _SEARCHED and inside and len(inside) < _SEARCHED
                if is_searched and id(inside) not in seen:
                    seen.add(id(inside))
                    left.append((inside, where))
