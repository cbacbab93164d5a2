"""What a loss function returns, and how step weights enter: as sums and their weights.

NOTE [A mean is not multiplied out]
A segment's loss is a mean that stands for so many steps, and most windows divide by that very
number. Between two large kernels an operation on one number takes as long as a thousand where
caches are warm, so the number of steps is kept beside the mean as a factor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tbptt_ckpt.data.blocks import StepWeight
from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.module.trees import Tree, keeps_more_than_its_values, map_tensors, tensors_of


class LossSum:
    """A running sum of losses, `total * factor`, and of their weights."""

    __slots__ = ("factor", "total", "weight")

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.factor = 1.0
        self.weight: float | Tensor = 0.0

    def add(self, total: Tensor, weight: float | Tensor, factor: float = 1.0) -> None:
        """Add one more loss, `total * factor`."""
        if self.total is None:
            self.total, self.factor = total, factor
        elif self.factor == factor:
            self.total = self.total + total
        else:
            self.total, self.factor = _times(self.total, self.factor) + _times(total, factor), 1.0
        self.weight = self.weight + weight

    def value(self) -> Tensor | None:
        """The sum; None of nothing."""
        return None if self.total is None else _times(self.total, self.factor)


def _times(total: Tensor, factor: float) -> Tensor:
    return total if factor == 1.0 else total * factor


class LossFunction:
    """The user's `loss_fn`, evaluated on one step or on the steps of a segment.

    A scalar is taken as the mean over the steps it was given and multiplied by their
    number; a pair `(loss_sum, weight)` is taken as it is. Which of the two it is shows at
    the first call and must not change.
    """

    def __init__(self, loss_fn: Callable[[Any, Any], Any]) -> None:
        if not callable(loss_fn):
            raise ArgumentError(
                f"loss_fn={loss_fn!r} is not callable; pass a function of (y, target)"
            )
        self.loss_fn = loss_fn
        self.returns_pairs: bool | None = None  # unknown before the first call

    def load_state(self, returns_pairs: bool | None) -> None:
        """Go on as a function that is known, or not yet, to return pairs."""
        self.returns_pairs = returns_pairs

    def add_step(self, losses: LossSum, output: Tree, target: Tree, weight: StepWeight) -> None:
        """Add the loss of one step; `output` and `target` have no time dimension."""
        if weight == 1.0:
            losses.add(*self._evaluate(output, target, 1))
            return
        _check_lanes((output, target), weight, 0)
        for value, lanes in _lane_groups(weight):
            part = (output, target) if lanes is None else _select((output, target), lanes, 0)
            self._add(losses, part, 1 if lanes is None else len(lanes), value)

    def add_segment(
        self,
        losses: LossSum,
        outputs: Tree,
        targets: Tree,
        weights: Sequence[StepWeight] | None,
        num_steps: int,
        time_dim: int,
    ) -> None:
        """Add the losses of consecutive steps, in as few calls as their weights allow."""
        for begin, end, weight in _equal_runs(weights, num_steps):
            part = _narrow((outputs, targets), begin, end, num_steps, time_dim)
            _check_lanes(part, weight, 1 - min(time_dim, 1))
            for value, lanes in _lane_groups(weight):
                chosen = part if lanes is None else _select(part, lanes, 1 - min(time_dim, 1))
                count = (end - begin) * (1 if lanes is None else len(lanes))
                self._add(losses, chosen, count, value)

    def _add(self, losses: LossSum, part: tuple[Tree, Tree], count: int, value: float) -> None:
        total, weight, factor = self._evaluate(part[0], part[1], count)
        losses.add(total, weight if value == 1.0 else weight * value, factor * value)

    def _evaluate(
        self, outputs: Tree, targets: Tree, count: int
    ) -> tuple[Tensor, float | Tensor, float]:
        """A loss, the weight of all its steps, and the factor that makes it their sum."""
        if outputs is None:
            raise ArgumentError(
                "module returned None as the output of a step whose loss counts; it may leave "
                "outputs out only where outputs_needed() is False"
            )
        if self.returns_pairs is None:
            value = self._first_call(outputs, targets)
        else:
            value = self.loss_fn(outputs, targets)
        if isinstance(value, Tensor) is self.returns_pairs:
            raise ArgumentError(
                "loss_fn returned a scalar once and a pair (loss_sum, weight) another time; "
                "it must always return the same"
            )
        if isinstance(value, Tensor):
            _check_scalar(value, "a loss")
            # torch's `mse_loss` takes the mean in place of the squares, which live on with it.
            if count > 1 and keeps_more_than_its_values(value):
                return value * count, float(count), 1.0
            return value, float(count), float(count)
        return *_checked_pair(value), 1.0

    def _first_call(self, outputs: Tree, targets: Tree) -> Any:
        before = torch.get_rng_state()
        value = self.loss_fn(outputs, targets)
        if not torch.equal(before, torch.get_rng_state()):
            raise ArgumentError(
                "loss_fn drew random numbers; it is not evaluated in every run of a step, so "
                "draw them in the module, where they are replayed"
            )
        self.returns_pairs = not isinstance(value, Tensor)
        return value


def _check_scalar(value: Tensor, what: str) -> None:
    if value.dim():
        raise ArgumentError(
            f"loss_fn returned {what} of shape {tuple(value.shape)}; return a scalar (the mean "
            "over the steps it was given), or a pair (loss_sum, weight)"
        )


def _checked_pair(value: Any) -> tuple[Tensor, float | Tensor]:
    is_pair = isinstance(value, tuple | list) and len(value) == 2
    if not (
        is_pair and isinstance(value[0], Tensor) and isinstance(value[1], Tensor | int | float)
    ):
        raise ArgumentError(
            f"loss_fn returned {_described(value)}; return a scalar tensor (the mean over the "
            "steps it was given), or a pair (loss_sum, weight) of a tensor and a number"
        )
    total, weight = value
    _check_scalar(total, "a loss_sum")
    if isinstance(weight, Tensor):
        _check_scalar(weight, "a weight")
        if weight.requires_grad:
            raise ArgumentError(
                "loss_fn returned (loss_sum, weight) whose weight requires grad; detach it"
            )
        return total, weight
    return total, float(weight)


def _described(value: object) -> str:
    if not isinstance(value, tuple | list):
        return type(value).__name__
    if len(value) != 2:
        return f"a {type(value).__name__} of {len(value)}"
    return f"a pair of a loss_sum {type(value[0]).__name__} and a weight {type(value[1]).__name__}"


def _check_lanes(tree: Tree, weight: StepWeight, dim: int) -> None:
    if isinstance(weight, float):
        return
    for tensor in tensors_of(tree):
        if tensor.dim() <= dim or tensor.shape[dim] != len(weight):
            raise ArgumentError(
                f"weight has {len(weight)} lanes, but outputs and targets with lanes on "
                f"dimension {dim} are needed for it, and one has shape {tuple(tensor.shape)}"
            )


def _lane_groups(weight: StepWeight) -> Iterator[tuple[float, list[int] | None]]:
    """Each distinct nonzero weight with its lanes; None stands for a step without lanes."""
    if isinstance(weight, float):
        if weight:
            yield weight, None
        return
    if weight and weight[0] and weight.count(weight[0]) == len(weight):
        yield weight[0], list(range(len(weight)))
        return
    for value in sorted(set(weight) - {0.0}):
        yield value, [lane for lane, w in enumerate(weight) if w == value]


def _equal_runs(
    weights: Sequence[StepWeight] | None, num_steps: int
) -> Iterator[tuple[int, int, StepWeight]]:
    """Maximal runs `[begin, end)` of steps with the same weight."""
    begin = 0
    for end in range(1, num_steps + 1):
        if end == num_steps or (weights is not None and weights[end] != weights[begin]):
            yield begin, end, 1.0 if weights is None else weights[begin]
            begin = end


def _narrow(tree: Tree, begin: int, end: int, num_steps: int, time_dim: int) -> Tree:
    if end - begin == num_steps:
        return tree
    return map_tensors(lambda t: t.narrow(time_dim, begin, end - begin), tree)


def _select(tree: Tree, lanes: list[int], dim: int) -> Tree:
    def select(tensor: Tensor) -> Tensor:
        if len(lanes) == tensor.shape[dim]:
            return tensor
        return tensor.index_select(dim, torch.tensor(lanes, device=tensor.device))

    return map_tensors(select, tree)


def is_present(weight: StepWeight) -> bool:
    """Whether a step with this weight has a loss."""
    return bool(weight) if isinstance(weight, float) else any(weight)
