"""The loss of one window while it comes together from its runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NoReturn, TypeGuard

import torch
from torch import Tensor

from tbptt_ckpt.data.blocks import StepBlock, narrow_blocks
from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.executor.loss_sum import LossSum
from tbptt_ckpt.executor.losses import LossFunction
from tbptt_ckpt.module.host import Number, Numbers, is_waited_for
from tbptt_ckpt.module.trees import detach_state


class WindowLoss:
    """The loss of the steps `[start, stop)` of a window while it comes together.

    Its divisor must be fixed before the first backward, which differentiates the last
    steps. It is counted, from the targets where they say what a mean counts; for losses whose
    weight shows only when they are evaluated it is summed in the first run of each step.
    """

    def __init__(
        self,
        function: LossFunction,
        blocks: Sequence[StepBlock],
        start: int,
        stop: int,
        reduction: str,
    ) -> None:
        self.function, self.reduction = function, reduction
        self._steps = blocks, start, stop
        parts = list(narrow_blocks(blocks, start, stop))
        self._counted = sum(part.weight_sum() for part in parts)
        function.begin((part.targets for part in parts), stop - start)
        # Where it is known how the loss counts, nothing else takes memory by now.
        self._foretold = None if function.counting is None else self._foretell()
        self._summed: float | Tensor = 0.0
        self._first_run_until = 0
        self._has_looked = self._all_count = False
        self._losses = LossSum()
        self._total = self._weighed = Number(0.0)
        self.has_graph = self.lacks_graph = False

    @property
    def weight(self) -> float | Tensor:
        """The summed weight of all steps; sums of torch's weigh a step, whatever counts in it."""
        counting = self.function.counting
        is_sum = counting is not None and counting.reduction == "sum"
        return self._counted if is_sum else self._what_counts()

    @property
    def positions(self) -> float:
        """What a mean is taken of, counted alike in windows of other lanes.

        That is what a loss function gives as weight, positions of targets where it is one of
        torch's, and otherwise steps of lanes; where sums are asked for, what they count.

        Raises:
            ArgumentError: The window's loss is not one that windows of other lanes add to.
        """
        counting = self.function.counting
        is_sum = counting is not None and counting.reduction == "sum"
        if self.reduction == "sum":
            has_lane_weights = any(_weighs_lanes(part) for part in narrow_blocks(*self._steps))
            if has_lane_weights or not (is_sum or self.function.weighs_itself):
                raise ArgumentError(
                    "reduction='sum' multiplies a mean, and what has weights of lanes, by what a "
                    "whole window counts, which is no sum over lanes of several ranks; use "
                    "reduction='mean', or a loss of torch's with reduction='sum' or (loss_sum, "
                    "weight), without weights of lanes"
                )
            return float(self.weight)
        if counting is not None and is_sum:
            raise ArgumentError(
                f"loss_fn calls {counting.name} with reduction='sum', and how windows of "
                "several ranks weigh is told by means only; use 'mean' there, or give "
                "reduction='sum', or return (loss_sum, weight)"
            )
        return self.mean_positions

    @property
    def mean_positions(self) -> float:
        """The same where nothing is refused; of sums of torch's what they count."""
        counting = self.function.counting
        if counting is not None and counting.reduction != "sum":
            return float(self.weight) * counting.unit
        if counting is not None or self.function.weighs_itself:
            return float(self.weight)
        return sum(part.weight_sum() * _lanes_of(part) for part in narrow_blocks(*self._steps))

    @property
    def divisor(self) -> float | Tensor:
        """What the summed loss is divided by; not zero, where nobody has looked at it yet."""
        weight = self.weight
        if _is_on_device(weight):
            weight = torch.where(weight == 0, 1, weight)
        return self.function.divisor(weight, self._counted, self.reduction)

    @property
    def all_count(self) -> bool:
        """Whether the targets are known to be counted whole, each position once."""
        counting = self.function.counting
        if self._all_count or counting is None:
            return self._all_count
        if counting.class_weight is None and counting.foretold:
            known = self._what_counts()
            self._all_count = isinstance(known, float) and known == self._counted
        return self._all_count

    def _what_counts(self) -> float | Tensor:
        if self.function.weighs_itself:
            return self._summed
        if self._foretold is None:
            self._foretold = self._foretell()
        return self._foretold

    def _foretell(self) -> float | Tensor:
        counting = self.function.counting
        return self._counted if counting is None else counting.foretell(*self._steps)

    @property
    def value(self) -> Tensor | None:
        """The window's loss, detached."""
        losses, divisor = self._losses, self.divisor
        if isinstance(divisor, float) and divisor == losses.factor != 1.0:
            return losses.total  # a mean that was small enough in memory to be kept as it is
        total = losses.value()
        return None if total is None else total / divisor

    @property
    def has_losses(self) -> bool:
        """Whether any loss was added."""
        return self._losses.total is not None

    def ask(self, numbers: Numbers) -> None:
        """All has run: ask for what the host is to know of it."""
        counted, total = self._what_counts(), self._losses.total
        self._weighed = numbers.ask(counted) if isinstance(counted, Tensor) else Number(counted)
        if total is not None:
            self._total = numbers.ask(total)

    @property
    def loss_sum(self) -> float:
        """The summed loss, not divided, once it was asked for; 0.0 of nothing."""
        return float(self._total) * self._losses.factor

    def add(self, losses: LossSum, *, constant: bool = False) -> None:
        """Add losses that were differentiated, or that are constant."""
        if losses.total is not None:
            self.has_graph = self.has_graph or losses.total.requires_grad
            self.lacks_graph = self.lacks_graph or not (constant or losses.total.requires_grad)
            # Some of torch's own losses are numbers that own as much memory as their inputs.
            total = losses.total.detach() if self.has_losses else detach_state(losses.total)
            self._losses.add(total, 0.0, losses.factor)

    def check_graph(self, parameters: Iterable[Tensor]) -> None:
        """Raise where plain PyTorch's backward would, because a loss depends on nothing."""
        learns = any(parameter.requires_grad for parameter in parameters)
        if learns and self.lacks_graph and not self.has_graph:
            raise ArgumentError(
                "loss_fn returned losses without a graph although there are weights to learn; "
                "outputs or losses must not be detached"
            )

    def is_known_empty(self) -> bool:
        """Whether the weights, now that all are known, sum to zero, as far as the host knows."""
        return not _is_on_device(counted := self._what_counts()) and self._is_zero(float(counted))

    def is_empty(self) -> bool:
        """Whether the weights that were asked for sum to zero: every position was masked.

        Raises:
            ArgumentError: A sum that no divisor can be.
        """
        if _is_on_device(self._what_counts()):
            self._foretold = self._summed = float(self._weighed)  # read once
        return self._is_zero(float(self._weighed))

    @staticmethod
    def _is_zero(weight: float) -> bool:
        if not 0 <= weight < float("inf"):
            raise ArgumentError(
                f"loss_fn returned weights that sum to {weight} in a window; they must be finite "
                "and not negative"
            )
        return weight == 0

    def new_sum(self) -> LossSum:
        """An empty sum of losses of a piece."""
        return LossSum(all_count=self.all_count, has_looked=self._has_looked)

    def weigh(self, begin: int, end: int, piece: LossSum) -> bool:
        """Count the weight of a piece unless an earlier run did; whether this run is the first."""
        self._has_looked = self._has_looked or piece.has_looked
        if begin < self._first_run_until:
            return False
        self._first_run_until = end
        self._summed = self._summed + piece.weight
        return True


def _lanes_of(block: StepBlock) -> int:
    """Lanes that a step's weight stands for."""
    return 1 if _weighs_lanes(block) else block.num_lanes()


def _weighs_lanes(block: StepBlock) -> bool:
    return block.weight is not None and block.weight.dim() == 2


def _is_on_device(weight: float | Tensor) -> TypeGuard[Tensor]:
    """Whether a device counts it, which would have to be waited for."""
    return isinstance(weight, Tensor) and is_waited_for(weight)


def _never_called(output: object, target: object) -> NoReturn:
    raise AssertionError("a window without a loss evaluates none")


NO_LOSS = WindowLoss(LossFunction(_never_called), (), 0, 0, "sum")


def has_loss(blocks: Sequence[StepBlock], start: int, stop: int) -> bool:
    """Whether any step in `[start, stop)` has a target that counts."""
    return any(block.has_loss() for block in narrow_blocks(blocks, start, stop))
