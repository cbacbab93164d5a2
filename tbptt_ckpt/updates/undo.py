"""Takes back an update of the weights, or the gradients of a window, that was cut short."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from tbptt_ckpt.errors import TbpttError
from tbptt_ckpt.module.trees import map_tensors, replace_tensors, tensors_of


class Update:
    """One update of the weights while it goes on.

    With `copies` it copies all that the update changes, weights, optimizer state, schedule and
    scale, which costs that much memory until the update is done.
    """

    def __init__(self, optimizer: Any, scheduler: Any, scaler: Any, copies: bool) -> None:
        self._optimizer = optimizer
        self._known = set(optimizer.state)
        self._versions = self._fingerprint()
        self._restore = copied(optimizer, scheduler, scaler) if copies else None

    def take_back(self) -> None:
        """Put everything back as it was; `TbpttError` where that is late, and there is no copy."""
        if self._restore is not None:
            self._restore()
        elif self._fingerprint() != self._versions:
            raise TbpttError(
                "the optimizer's step was cut short after it had updated some of the weights, "
                "and no copy was kept; go on from the last snapshot"
            )
        else:
            for key in set(self._optimizer.state) - self._known:
                del self._optimizer.state[key]  # perhaps filled only in part

    def _fingerprint(self) -> list[int]:
        weights = [p for group in self._optimizer.param_groups for p in group["params"]]
        states = tensors_of([self._optimizer.state[key] for key in self._known])
        return [tensor._version for tensor in (*weights, *states)]


def copy_on_host(tensor: Tensor) -> Tensor:
    """Its values where no device has to have room for them."""
    return tensor.detach().to("cpu", copy=True)


def _copy_there(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def copied(
    optimizer: Any, *others: Any, copy_tensor: Callable[[Tensor], Tensor] = _copy_there
) -> Callable[[], None]:
    """Copy what an update changes, or a load; what is returned puts it back."""
    groups = [dict(group) for group in optimizer.param_groups]
    weights = [(p, copy_tensor(p)) for group in groups for p in group["params"]]
    states = {key: map_tensors(copy_tensor, state) for key, state in optimizer.state.items()}
    places = {key: [t.device for t in tensors_of(each)] for key, each in optimizer.state.items()}
    saved = [(each, copy.deepcopy(each.state_dict())) for each in others if each is not None]

    def restore() -> None:
        with torch.no_grad():
            for parameter, values in weights:
                parameter.copy_(values)
        optimizer.state.clear()
        for key, state in states.items():
            pairs = zip(tensors_of(state), places[key], strict=True)
            optimizer.state[key] = replace_tensors(state, [t.to(place) for t, place in pairs])
        for group, before in zip(optimizer.param_groups, groups, strict=True):
            group.clear()  # a load may have brought more
            group.update(before)
        for each, state in saved:
            if state:  # a scaler that is off has none
                each.load_state_dict(state)

    return restore


class Aside:
    """Copies of the gradients of `tensors` that are kept; whoever wants the same shares them."""

    def __init__(self, tensors: Sequence[Tensor], *, keeps: bool) -> None:
        found = [t.grad if keeps else None for t in tensors]
        self.grads = [None if grad is None else grad.clone() for grad in found]
        self._tensors = tensors
        self._copied = [None if grad is None else (ref(grad), grad._version) for grad in found]

    def is_of(self, tensors: Sequence[Tensor]) -> bool:
        """Whether `tensors` have the gradients that were copied."""
        if len(tensors) != len(self._copied):
            return False
        found = [tensor.grad for tensor in tensors]
        return all(map(_is_copied, found, self._copied))

    def put_back(self) -> None:
        """Forget what has become of them."""
        for tensor, grad in zip(self._tensors, self.grads, strict=True):
            tensor.grad = grad


def _is_copied(grad: Tensor | None, copied: tuple[ref[Tensor], int] | None) -> bool:
    if grad is None or copied is None:
        return grad is None and copied is None
    return grad is copied[0]() and grad._version == copied[1]
