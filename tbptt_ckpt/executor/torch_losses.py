"""torch's own losses, recognised where they are called, and which positions their means count.

NOTE [A mean is told by its count]
A mean over a part of a window says nothing about the window unless it is known how many positions
it is a mean of: `cross_entropy` leaves ignored targets out, a mask leaves out what it likes. Where
what a loss returns is the result of one call of torch's, the call itself says how many they were.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tbptt_ckpt.data.blocks import Column, StepBlock, narrow_blocks
from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.module.first_call import check_classes
from tbptt_ckpt.module.host import is_waited_for, sent
from tbptt_ckpt.module.trees import Tree, tensors_of

_BY_CLASS = (F.cross_entropy, F.nll_loss)
_BY_ELEMENT = (
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
    F.cosine_embedding_loss,
    F.gaussian_nll_loss,
    F.hinge_embedding_loss,
    F.huber_loss,
    F.kl_div,
    F.l1_loss,
    F.margin_ranking_loss,
    F.mse_loss,
    F.multi_margin_loss,
    F.multilabel_margin_loss,
    F.multilabel_soft_margin_loss,
    F.poisson_nll_loss,
    F.smooth_l1_loss,
    F.soft_margin_loss,
)
# Their weights are in torch's divisor too.
_WEIGHTED_MEANS = (F.huber_loss, F.l1_loss, F.mse_loss)
_PARAMETERS: dict[Callable[..., Any], tuple[str, ...]] = {
    function: tuple(inspect.signature(function).parameters)
    for function in (*_BY_CLASS, *_BY_ELEMENT)
}
# What keeps all elements of a tensor, in whatever order, shape and dtype.
_KEEPS_ELEMENTS = frozenset(
    getattr(owner, name)
    for owner in (Tensor, torch)
    for name in (
        *("clone", "contiguous", "detach", "double", "flatten", "float", "int", "long", "moveaxis"),
        *("movedim", "permute", "ravel", "reshape", "squeeze", "swapaxes", "swapdims", "t", "to"),
        *("transpose", "type", "unsqueeze", "view"),
    )
    if hasattr(owner, name)
)
# How many elements these give may depend on values.
_SELECT = frozenset(
    getattr(owner, name)
    for owner in (Tensor, torch)
    for name in ("argwhere", "index_select", "masked_select", "nonzero", "take", "unique", "where")
    if hasattr(owner, name)
)

# Positions that are counted at once, before a window has anything else in memory: a host copies
# them into wider numbers, a device sums them as they are and takes as long for few as for many.
_COUNTED_ON_HOST, _COUNTED_ON_DEVICE = 1 << 10, 1 << 16


@dataclass(frozen=True, slots=True)
class TorchCall:
    """One call of a loss of torch's."""

    function: Callable[..., Any]
    value: Tensor  # what it returned
    reduction: str  # "mean" or "sum"
    counted: Tensor  # an element per position
    leaf: int | None  # the tensor of the loss's target that has these elements
    shaped: bool  # whether there are as many in every step
    ignore_index: int | None  # None where no target is ignored
    class_weight: Tensor | None
    total: Tensor | None = None  # the sum, where the mean may be of nothing and nobody may wait

    def hits(self) -> float | Tensor:
        """The positions that count, or their summed class weights: torch's divisor."""
        counts = counts_of(self.counted, self.ignore_index, self.class_weight)
        return float(self.counted.numel()) if counts is None else on_host(counts.sum())


def counts_of(
    targets: Tensor, ignore_index: int | None, class_weight: Tensor | None
) -> Tensor | None:
    """How much each position counts; None where each counts one."""
    if ignore_index is None:
        return None
    kept = targets != ignore_index
    if class_weight is None:
        return kept
    places = torch.where(kept, targets, 0).long().clamp(0, class_weight.numel() - 1)
    return class_weight.detach().double()[places] * kept


def on_host(count: Tensor) -> float | Tensor:
    """A count as a number, unless somebody would have to wait for it."""
    return count if is_waited_for(count) else float(count)


class LossCalls(TorchFunctionMode):
    """While entered, notes the last call of a loss of torch's, and what it was called on."""

    def __init__(self, outputs: Tree, targets: Tree) -> None:
        super().__init__()
        self.last: TorchCall | None = None
        self._selects = False
        # Tensors with all the elements of one that the loss was given: a target's place, or None.
        # Whoever writes into one of them makes other elements.
        self._origins: dict[int, tuple[Tensor, int, int | None]] = {}
        self._outputs = outputs
        for tensor in tensors_of(outputs):
            self._origins[id(tensor)] = tensor, _version_of(tensor), None
        for place, tensor in enumerate(tensors_of(targets)):
            self._origins[id(tensor)] = tensor, _version_of(tensor), place

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operation, and note it if it is a loss."""
        given = kwargs or {}
        if func in _BY_CLASS:
            named = {**dict(zip(_PARAMETERS[func], args, strict=False)), **given}
            y, target = named["input"], named["target"]
            check_classes(func.__name__, y, target, returned=self._outputs)
        value = func(*args, **given)
        if func in _PARAMETERS:
            self.last = self._noted(func, args, given, value)
            return value if self.last is None else self.last.value
        if func in _SELECT or (func is Tensor.__getitem__ and _holds_tensors(args[1])):
            self._selects = True
        elif func in _KEEPS_ELEMENTS and args:
            origin = self._origin(args[0])
            if origin is not None:
                self._origins[id(value)] = value, _version_of(value), origin[2]
            elif self.last is not None and args[0] is self.last.value:
                self.last = replace(self.last, value=value)
        return value

    def made(self, value: object) -> TorchCall | None:
        """The call whose result `value` is."""
        return self.last if self.last is not None and self.last.value is value else None

    def _origin(self, tensor: object) -> tuple[Tensor, int, int | None] | None:
        origin = self._origins.get(id(tensor))
        return None if origin is None or _version_of(origin[0]) != origin[1] else origin

    def _noted(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        value: Tensor,
    ) -> TorchCall | None:
        """The call, if it sums positions or takes their mean."""
        given = {**dict(zip(_PARAMETERS[function], args, strict=False)), **kwargs}
        reduction, weight = given.get("reduction", "mean"), given.get("weight")
        if given.get("size_average") is not None or given.get("reduce") is not None:
            return None  # deprecated
        if reduction not in ("mean", "sum") or (weight is not None and function in _WEIGHTED_MEANS):
            return None
        first, second = (given[name] for name in _PARAMETERS[function][:2])
        by_class = function in _BY_CLASS
        by_index = by_class and not second.is_floating_point()
        counted = second if by_class or second.numel() >= first.numel() else first
        ignored, class_weight = (
            (given.get("ignore_index", -100), weight) if by_index else (None,) * 2
        )
        total = None
        if by_index and reduction == "mean" and is_waited_for(value):
            total = function(**{**given, "reduction": "sum"})
            counts = counts_of(second, ignored, class_weight)
            assert counts is not None, "classes are counted"
            hits = counts.sum().to(total.dtype)
            value = total / torch.where(hits == 0, 1, hits)
        origin = self._origin(counted)
        leaf = None if origin is None else origin[2]
        known = leaf is not None or self._origin(first) is not None
        shaped = ignored is None and (known or not self._selects)
        return TorchCall(
            function, value, reduction, counted, leaf, shaped, ignored, class_weight, total
        )


@dataclass(frozen=True, slots=True)
class Counting:
    """How a recognised loss counts, as its first call showed it."""

    name: str  # of torch's function
    reduction: str
    unit: float  # positions per step, or per step of a lane
    foretold: bool  # whether targets alone tell the count
    leaf: int | None  # the target tensor that is counted; None where shapes alone say it
    ignore_index: int | None
    class_weight: Tensor | None

    def steps_of(self, hits: float | Tensor, count: int) -> float | Tensor:
        """Positions as steps: `count` exactly, where all count."""
        if isinstance(hits, float) and hits == self.unit * count:
            return float(count)
        return hits / self.unit

    def counts_like(self, other: Counting) -> bool:
        """Whether the same targets count."""
        mine, theirs = self.class_weight, other.class_weight
        if mine is not theirs and (mine is None or theirs is None or not torch.equal(mine, theirs)):
            return False
        if self.leaf is None and self.unit != other.unit:
            return False
        return other.foretold and (self.leaf, self.ignore_index) == (other.leaf, other.ignore_index)

    def foretell(self, blocks: Sequence[StepBlock], start: int, stop: int) -> float | Tensor:
        """What the steps `[start, stop)` add to the divisor of a mean."""
        parts = narrow_blocks(blocks, start, stop)
        summed: float | Tensor = 0.0
        for part in parts:
            if part.targets is not None:
                summed = summed + self._foretold_of(part)
        return summed

    def _foretold_of(self, block: StepBlock) -> float | Tensor:
        if self.leaf is None:
            return block.weight_sum()
        if isinstance(block.targets, Column):
            steps = [self._counted(value) for value in block.targets.values]
            weights = torch.ones(len(steps), device="cpu") if block.weight is None else block.weight
            pairs = zip(steps, weights, strict=True)
            return sum(self._weighed(row[None], weight[None]) for row, weight in pairs)
        rows = self._counted(block.targets).movedim(block.time_dim, 0)
        weighed = rows.shape[0] if block.weight is None else block.weight.numel()
        if self.ignore_index is None and rows.numel() == self.unit * weighed:
            return block.weight_sum()  # all count, in steps as large as the first
        return self._weighed(rows, block.weight)

    def _counted(self, targets: Tree) -> Tensor:
        """Of them the tensor that is counted."""
        found, place = tensors_of(targets), self.leaf or 0
        if place >= len(found):
            raise ArgumentError(f"targets are {len(found)} tensors, of which {place} is to count")
        return found[place]

    def _weighed(self, rows: Tensor, weight: Tensor | None) -> float | Tensor:
        """Counts of steps [n, ...], weighed by [n] or [n, B], in steps."""
        most = _COUNTED_ON_DEVICE if is_waited_for(rows) else _COUNTED_ON_HOST
        num_steps = max(1, most * len(rows) // max(1, rows.numel()))
        weights = repeat(None) if weight is None else torch.split(weight, num_steps)
        parts = zip(torch.split(rows, num_steps), weights, strict=False)
        hits: float | Tensor = 0.0
        for part in parts:
            hits = hits + self._hits(*part)
        return self.steps_of(hits, len(rows)) if weight is None else hits / self.unit

    def _hits(self, rows: Tensor, weight: Tensor | None) -> float | Tensor:
        """The same of a few steps, in positions."""
        counts = counts_of(rows, self.ignore_index, self.class_weight)
        counts = torch.ones_like(rows, dtype=torch.bool) if counts is None else counts
        if weight is None:
            return on_host(counts.sum())
        by_weight = counts.reshape(*weight.shape, -1).sum(-1)
        return on_host((by_weight * sent(weight, by_weight.device)).sum())


def _version_of(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _holds_tensors(index: object) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, Tensor | list) for part in parts)


def counting_of(call: TorchCall, count: int) -> Counting:
    """What a call shows; `count` is the number of steps, or of steps of lanes."""
    return Counting(
        name=call.function.__name__,
        reduction=call.reduction,
        unit=call.counted.numel() / count,
        foretold=call.leaf is not None or call.shaped,
        leaf=call.leaf,
        ignore_index=call.ignore_index,
        class_weight=call.class_weight,
    )
