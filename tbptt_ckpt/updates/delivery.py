"""A window's gradient, handed to the weights once, so that their hooks see it whole.

NOTE [Delivered once]
A window is differentiated leaf by leaf, and autograd runs what hangs on a weight (clipping in a
hook, an optimizer inside the backward) whenever a gradient arrives there. That would be once for
each leaf, with a leaf's share. The hooks are therefore emptied, in place, while leaves are
differentiated, and put back before each weight is given the whole gradient by a backward of its
own, in the order in which plain BPTT would reach the weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, Self

import torch
from torch import Tensor


def has_hooks(weight: Tensor) -> bool:
    """Whether something runs when a gradient arrives at the weight, as far as it can be seen."""
    hooks = weight._backward_hooks or weight._post_accumulate_grad_hooks
    return bool(hooks) and weight.requires_grad


class Delivery:
    """While entered, those of `weights` that have hooks collect their gradients unseen by them.

    What `.grad` held before is set aside until then, and added to as plain BPTT would. Costs one
    more gradient of one weight at a time, and where gradients accumulate what is set aside.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        order = itertools.count()
        distinct = {id(weight): weight for weight in weights}.values()
        self._waiting = [_Waiting(weight, order) for weight in distinct if has_hooks(weight)]

    def __enter__(self) -> Self:
        for waiting in self._waiting:
            waiting.begin()
        return self

    def __exit__(self, *_: object) -> None:
        for waiting in self._waiting:
            waiting.end()

    def deliver(self) -> None:
        """The gradients are whole: hand them over."""
        for waiting in sorted(self._waiting, key=_Waiting.last_seen):
            total = waiting.end()
            if total is not None:
                torch.autograd.backward([waiting.weight], [total])


class _Waiting:
    """A weight that waits for its gradient, without its hooks."""

    def __init__(self, weight: Tensor, order: itertools.count[int]) -> None:
        self.weight = weight
        self._order, self._last_seen = order, -1
        self._is_waiting, self._before = False, weight.grad
        self._hooks: list[tuple[dict[int, Any], dict[int, Any]]] = []

    def last_seen(self) -> int:
        """Where the weight's last part came among those of all weights."""
        return self._last_seen

    def begin(self) -> None:
        """Take the hooks off, and what is in `.grad`."""
        found = (self.weight._backward_hooks, self.weight._post_accumulate_grad_hooks)
        self._hooks = [(hooks, dict(hooks)) for hooks in found if hooks]
        for hooks, _ in self._hooks:
            hooks.clear()
        self._before, self.weight.grad = self.weight.grad, None
        self._handle = self.weight.register_hook(self._sees)  # type: ignore[no-untyped-call]
        self._is_waiting = True

    def end(self) -> Tensor | None:
        """Put everything back, once; what has come meanwhile."""
        if not self._is_waiting:
            return None
        self._is_waiting = False
        self._handle.remove()
        for hooks, content in self._hooks:
            later = dict(hooks)  # registered meanwhile
            hooks.clear()
            hooks.update(content | later)
        total, self.weight.grad = self.weight.grad, self._before
        return total

    def _sees(self, _: Tensor) -> None:
        self._last_seen = next(self._order)
