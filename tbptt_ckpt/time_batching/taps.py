"""The tap: one gradient per weight and leaf, made when the last step has left its part.

NOTE [Order]
Every operation of a leaf that uses a tapped weight has an edge to the tap's token. Autograd
runs a node once all nodes with an edge to it have run, so the tap's backward comes after the
backward of every step, and makes one product over all of them.

NOTE [Which backward]
A module may differentiate within a step, through a part of the leaf, and a hook within the
backward of the leaf. What a step leaves to the tap carries the number of the backward that left
it, and a tap takes its own only. Such a backward may free the tap, which all steps share: the
tap therefore saves no tensor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor

from tbptt_ckpt.errors import TbpttError

Gradients = tuple[Tensor | None, ...]
Tensors = Sequence[Tensor | None]
Part = TypeVar("Part")
Function = TypeVar("Function", bound=Callable[..., Any])

# Elements of a weight whose gradient is worth finding out whether it may be added in place.
_SMALLEST_TOTAL = 65_536


def undisturbed(function: Function) -> Function:
    """No mode looks at what a function does.

    A default device is a mode: it would be called for every operation and every attribute of a
    tensor.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch._C._len_torch_function_stack():
            return function(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            return function(*args, **kwargs)

    return cast(Function, run)


class Versions:
    """Holds weights, and notices what is done to them within a leaf or before its backward."""

    def __init__(self, *weights: Tensor | None) -> None:
        self._weights = [weight for weight in weights if weight is not None]
        self._written = [weight._version for weight in self._weights]
        self._found = [(weight._version, weight.requires_grad) for weight in self._weights]

    def written(self) -> bool:
        """Whether a weight has been written to."""
        return [weight._version for weight in self._weights] != self._written

    def changed(self) -> bool:
        """Whether a weight has been written to, frozen or set free: a call must not join others."""
        return [(weight._version, weight.requires_grad) for weight in self._weights] != self._found


class Record(ABC, Generic[Part]):
    """What the calls of a leaf leave to the tap of their weights, each backward's by itself."""

    def __init__(self, *weights: Tensor | None) -> None:
        self.versions = Versions(*weights)
        self._parts: dict[int, dict[int, Part]] = {}

    def leave(self, call: int, part: Part) -> None:
        """Leave one call's part to the tap of the backward that runs."""
        self._parts.setdefault(torch._C._current_graph_task_id(), {})[call] = part

    def take(self) -> dict[int, Part]:
        """The parts of the calls that the backward which runs has come through, in order."""
        parts = self._parts.pop(torch._C._current_graph_task_id(), {})
        return dict(sorted(parts.items()))

    @abstractmethod
    def collect(self, parts: dict[int, Part], needs: Sequence[bool], totals: Tensors) -> Gradients:
        """The gradients of the weights and rows that were tapped, as far as they are needed.

        That of a weight with a total may be added to it instead of being given back. Parts may be
        taken out, which frees their memory.
        """


class Tap(torch.autograd.Function):
    """From weights to a token without elements."""

    @staticmethod
    def forward(ctx: Any, record: Record[Any], weights: Tensors, *tapped: Tensor | None) -> Tensor:
        """Tap the weights, and rows of the inputs where these have a gradient."""
        ctx.set_materialize_grads(False)
        ctx.record, ctx.weights = record, weights
        (first, *_) = (weight for weight in weights if weight is not None)
        return first.new_empty(0)

    @staticmethod
    @undisturbed
    def backward(ctx: Any, *_grads: Any) -> Any:
        """Make the products."""
        parts, needs = ctx.record.take(), ctx.needs_input_grad
        if not parts:
            return (None,) * len(needs)
        totals = [total_of(weight) for weight in ctx.weights]
        return (None, None, *ctx.record.collect(parts, needs[2:], totals))


def total_of(weight: Tensor | None) -> Tensor | None:
    """`weight.grad`, if nobody can tell whether autograd or the tap adds to it.

    This spares a temporary as large as the weight. The backward must be one that accumulates,
    with no hook on the weight and no other process that waits for its gradient.
    """
    if weight is None or weight.numel() < _SMALLEST_TOTAL:
        return None
    if not weight.is_leaf or not weight.requires_grad or weight.grad is None:
        return None
    grad = weight.grad
    hooks = weight._backward_hooks or weight._post_accumulate_grad_hooks
    alike = grad.dtype == weight.dtype and grad.layout == torch.strided and grad.is_contiguous()
    if hooks or not alike or grad.requires_grad or type(grad) is not Tensor:
        return None
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return None
    try:
        node = torch.autograd.graph.get_gradient_edge(weight).node
        accumulates = torch._C._will_engine_execute_node(node)
    except RuntimeError:  # torch.autograd.grad with respect to the weight
        return None
    return grad if accumulates else None


def begin_backward(versions: Versions) -> None:
    """Raise if the weights have been written to, or the backward is to be differentiated itself."""
    if torch.is_grad_enabled():
        raise TbpttError(
            "a gradient that passes through a time-batched operation cannot be differentiated "
            "again (create_graph=True within a step); use time_batching=False"
        )
    if versions.written():
        raise modified_in_place("weights")


def modified_in_place(what: str) -> RuntimeError:
    """What autograd raises for a saved tensor that was written to."""
    return RuntimeError(
        f"one of the {what} needed for gradient computation has been modified by an inplace "
        "operation"
    )
