"""Gradients of leaf tensors, collected without what hangs on their accumulation nodes.

NOTE [Accumulation nodes]
What else hangs there is not seen at all. `deliver="once"` has leaves differentiated by
`torch.autograd.grad`, which stops before these nodes, with respect to all that the graph leads to.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

_AccumulateGrad: Any = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]


class Collected(threading.local):
    """While entered, `backward` collects gradients without their accumulation nodes."""

    def __init__(self) -> None:
        self.depth = 0
        self._sums = dict[int, Tensor]()  # of leaf tensors: those made here, which nobody shares

    def __enter__(self) -> None:
        self.depth += 1

    def __exit__(self, *_: object) -> None:
        self.depth -= 1
        self._sums.clear()

    def add(self, leaves: Sequence[Tensor], parts: Sequence[Tensor | None]) -> None:
        """Add a part of the gradient of each leaf tensor to its `.grad`, and tell its hooks."""
        sums, added = list[Tensor](), list[Tensor]()
        for leaf, part in zip(leaves, parts, strict=True):
            if part is None:
                continue
            so_far = leaf.grad
            if so_far is None:
                leaf.grad = part
            elif so_far is self._sums.get(id(leaf)) and not part.is_sparse:
                sums.append(so_far)
                added.append(part)
            else:  # added as a new tensor: others may share what was found
                leaf.grad = part + so_far if so_far.is_sparse else so_far + part
                self._sums[id(leaf)] = leaf.grad
        if sums:
            torch._foreach_add_(sums, added)
        for leaf, part in zip(leaves, parts, strict=True):
            if part is not None and leaf._post_accumulate_grad_hooks:
                for hook in list(leaf._post_accumulate_grad_hooks.values()):
                    hook(leaf)


collected = Collected()


def backward(tensors: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    """`torch.autograd.backward`, unseen by what hangs on accumulation nodes where that is asked."""
    if not collected.depth:
        torch.autograd.backward(tensors, grads)
        return
    leaves = _leaves_of(tensors)
    collected.add(leaves, torch.autograd.grad(tensors, leaves, grads, allow_unused=True))


def _leaves_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The leaf tensors that the graphs of some tensors lead to, each once.

    All of each graph is walked: nothing else tells of a weight that nobody has named, and two
    graphs of one form may lead to different ones.
    """
    leaves, left = dict[int, Tensor](), list[Any]()
    for tensor in tensors:
        if tensor.grad_fn is None:
            leaves[id(tensor)] = tensor
        else:
            left.append(tensor.grad_fn)
    seen = set(left)
    for node in left:
        for after, _ in node.next_functions:
            if after is None or after in seen:
                continue
            seen.add(after)
            if isinstance(after, _AccumulateGrad):  # leads nowhere
                leaves[id(after.variable)] = after.variable
            else:
                left.append(after)
    return list(leaves.values())
