"""Where outputs go while steps run: into the loss of a window, or into a list."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from tbptt_ckpt.data.blocks import StepWeight
from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.executor.losses import LossFunction, LossSum
from tbptt_ckpt.executor.task import WindowTask
from tbptt_ckpt.module.trees import Tree, tensors_of


class Sink(Protocol):
    """Takes the outputs of one run, piece by piece."""

    def wanted(self, begin: int, end: int) -> range:
        """The steps of the piece `[begin, end)` whose outputs are wanted, its last ones."""
        ...

    def take_step(self, output: Tree, target: Tree, weight: StepWeight) -> None:
        """The output of one step."""
        ...

    def take_segment(
        self,
        outputs: Tree,
        targets: Tree,
        weights: list[StepWeight] | None,
        num_steps: int,
        time_dim: int,
    ) -> None:
        """The outputs of consecutive steps."""
        ...

    def close(self, begin: int, end: int) -> None:
        """The piece `[begin, end)` is done."""
        ...

    def tensors(self) -> list[Tensor]:
        """What was made of the outputs, with its graph."""
        ...


class WindowLoss:
    """The loss of a window while it comes together.

    Its divisor must be fixed before the first backward, which differentiates the last
    steps. For scalar losses it is counted; for pairs it is summed in the first run of
    each step.

    Args:
        function: The loss function.
        counted_weight: The summed weight if losses are scalars.
        reduction: "mean" divides by the summed weight, "sum" does not.
    """

    def __init__(self, function: LossFunction, counted_weight: float, reduction: str) -> None:
        self.function, self.reduction = function, reduction
        self._counted, self._summed = counted_weight, LossSum()
        self._first_run_until = 0
        self._losses = LossSum()
        self.has_graph = False

    @property
    def weight(self) -> float | Tensor:
        """The summed weight of all steps."""
        return self._summed.weight if self.function.returns_pairs else self._counted

    @property
    def divisor(self) -> float | Tensor:
        """What the summed loss is divided by."""
        return self.weight if self.reduction == "mean" else 1.0

    @property
    def value(self) -> Tensor | None:
        """The window's loss, detached."""
        losses, divisor = self._losses, self.divisor
        if isinstance(divisor, float) and divisor == losses.factor != 1.0:
            return losses.total  # a mean that was small enough in memory to be kept as it is
        total = losses.value()
        return None if total is None else total / divisor

    @property
    def loss_sum(self) -> float | None:
        """The summed loss, not divided."""
        losses = self._losses
        return None if losses.total is None else float(losses.total) * losses.factor

    def add(self, losses: LossSum) -> None:
        """Add losses that were differentiated, or that are constant."""
        if losses.total is not None:
            self.has_graph = self.has_graph or losses.total.requires_grad
            self._losses.add(losses.total.detach(), 0.0, losses.factor)

    def is_empty(self) -> bool:
        """Whether the weights, now that all are known, sum to zero: every position was masked.

        Raises:
            ArgumentError: A sum that no divisor can be.
        """
        weight = float(self.weight)
        if not 0 <= weight < float("inf"):
            raise ArgumentError(
                f"loss_fn returned weights that sum to {weight} in a window; they must be finite "
                "and not negative"
            )
        return weight == 0

    def weigh(self, begin: int, end: int, weight: float | Tensor) -> bool:
        """Count the weight of a piece unless an earlier run did; whether this run is the first."""
        if begin < self._first_run_until:
            return False
        self._first_run_until = end
        self._summed.weight = self._summed.weight + weight
        return True


class LossSink:
    """Sums the losses of one run.

    Args:
        task: The window.
        loss: Its loss.
        graph: Whether the run is differentiated. An advance evaluates a loss only where it
            is constant or where its weight is not known otherwise.

    Attributes:
        losses: Their sum, with its graph.
    """

    def __init__(self, task: WindowTask, loss: WindowLoss, graph: bool) -> None:
        self._task, self._loss, self._graph = task, loss, graph
        self._piece = LossSum()
        self.losses = LossSum()

    def wanted(self, begin: int, end: int) -> range:
        """The steps of a piece that have a loss."""
        low = max(begin, self._task.loss_start)
        evaluate = (
            self._graph or end <= self._task.start or self._loss.function.returns_pairs is not False
        )
        return range(low, end) if evaluate and low < end else range(0)

    def take_step(self, output: Tree, target: Tree, weight: StepWeight) -> None:
        """Add the loss of one step."""
        self._loss.function.add_step(self._piece, output, target, weight)

    def take_segment(
        self,
        outputs: Tree,
        targets: Tree,
        weights: list[StepWeight] | None,
        num_steps: int,
        time_dim: int,
    ) -> None:
        """Add the losses of consecutive steps."""
        self._loss.function.add_segment(self._piece, outputs, targets, weights, num_steps, time_dim)

    def close(self, begin: int, end: int) -> None:
        """Fold the piece into the run, or into the window's constant part."""
        piece, self._piece = self._piece, LossSum()
        first_run = self._loss.weigh(begin, end, piece.weight)
        if piece.total is None:
            return
        if self._graph:
            self.losses.add(piece.total, 0.0, piece.factor)
        elif first_run and end <= self._task.start:
            self._loss.add(piece)

    def tensors(self) -> list[Tensor]:
        """What is summed, if there is anything."""
        return [] if self.losses.total is None else [self.losses.total]


class OutputSink:
    """Keeps the outputs of one run."""

    def __init__(self) -> None:
        self.outputs: list[Tree] = []

    def wanted(self, begin: int, end: int) -> range:
        """Every step."""
        return range(begin, end)

    def take_step(self, output: Tree, target: Tree, weight: StepWeight) -> None:
        """Keep the output of one step."""
        self.outputs.append(output)

    def take_segment(
        self,
        outputs: Tree,
        targets: Tree,
        weights: list[StepWeight] | None,
        num_steps: int,
        time_dim: int,
    ) -> None:
        """Keep the outputs of consecutive steps."""
        self.outputs.append(outputs)

    def close(self, begin: int, end: int) -> None:
        """Nothing is left to do."""

    def tensors(self) -> list[Tensor]:
        """All tensors of the outputs, in order."""
        return tensors_of(self.outputs)
