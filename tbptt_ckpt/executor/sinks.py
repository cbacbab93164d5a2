"""Where outputs go while steps run: into the loss of a window, or into a list."""

from __future__ import annotations

from itertools import repeat

from torch import Tensor

from tbptt_ckpt.data.blocks import StepBlock, StepWeight, steps_of
from tbptt_ckpt.executor.folded_losses import add_folded, folds
from tbptt_ckpt.executor.loss_sum import LossSum
from tbptt_ckpt.executor.weighted_steps import is_present
from tbptt_ckpt.executor.window_loss import WindowLoss
from tbptt_ckpt.module.trees import Tree, map_tensors, tensors_of


class Sink:
    """Takes the outputs of one run, piece by piece, and keeps them."""

    def __init__(self) -> None:
        self.outputs: list[Tree] = []

    def wanted(self, begin: int, end: int) -> range:
        """The steps of the piece `[begin, end)` whose outputs are wanted, its last ones."""
        return range(begin, end)

    def take_step(self, output: Tree, target: Tree, weight: StepWeight) -> None:
        """The output of one step."""
        self.outputs.append(output)

    def take_steps(self, outputs: Tree, block: StepBlock) -> None:
        """The outputs of the steps of a block, of a module of one step, with time first."""
        weights = block.step_weights()
        rows = steps_of(outputs, 0, block.stop - block.start)
        for output, target, weight in zip(
            rows, block.step_targets(), repeat(1.0) if weights is None else weights, strict=False
        ):
            if is_present(weight):  # a loss may write into its own
                self.take_step(map_tensors(Tensor.clone, output), target, weight)

    def take_segment(self, outputs: Tree, targets: Tree, block: StepBlock, time_dim: int) -> None:
        """The outputs of the steps of a block, and their targets, with time on `time_dim`."""
        self.outputs.append(outputs)

    def passed(self, step: int, outputs: Tree, time_dim: int | None = None) -> None:
        """What a run gave up to `step`, be it wanted or not: one step's outputs, or a segment's."""

    def close(self, begin: int, end: int) -> None:
        """The piece `[begin, end)` is done."""

    def tensors(self) -> list[Tensor]:
        """What was made of the outputs, with its graph."""
        return tensors_of(self.outputs)


class LossSink(Sink):
    """Sums the losses of one run.

    Args:
        loss: The window's loss.
        start: First step that is differentiated.
        loss_start: First step whose loss counts.
        graph: Whether the run is differentiated. An advance evaluates a loss only where it
            is constant or where its weight is not known otherwise.
        looks_at: The output of the step before this one is set aside, to be looked at.

    Attributes:
        losses: Their sum, with its graph.
    """

    def __init__(
        self, loss: WindowLoss, start: int, loss_start: int, *, graph: bool, looks_at: int = -1
    ) -> None:
        self._loss, self._start, self._loss_start, self._graph = loss, start, loss_start, graph
        self._looks_at, self._seen = looks_at, None
        self._piece = loss.new_sum()
        self.losses = LossSum()

    def wanted(self, begin: int, end: int) -> range:
        """The steps of a piece that have a loss."""
        low = max(begin, self._loss_start)
        evaluate = self._graph or end <= self._start or self._loss.function.may_weigh_itself
        return range(low, end) if evaluate and low < end else range(0)

    def take_step(self, output: Tree, target: Tree, weight: StepWeight) -> None:
        """Add the loss of one step."""
        self._loss.function.add_step(self._piece, output, target, weight)

    def take_steps(self, outputs: Tree, block: StepBlock) -> None:
        """Add the losses of consecutive steps of a module of one step, at once if they allow it."""
        function = self._loss.function
        if not folds(function, outputs, block.targets):
            return super().take_steps(outputs, block)
        return add_folded(function, self._piece, outputs, block.targets, block.step_weights())

    def take_segment(self, outputs: Tree, targets: Tree, block: StepBlock, time_dim: int) -> None:
        """Add the losses of consecutive steps."""
        weights, num_steps = block.step_weights(), block.stop - block.start
        self._loss.function.add_segment(self._piece, outputs, targets, weights, num_steps, time_dim)

    def passed(self, step: int, outputs: Tree, time_dim: int | None = None) -> None:
        """Set the last output aside where it is to be looked at."""
        if step == self._looks_at:
            self._seen = map_tensors(lambda t: _last(t.detach(), time_dim), outputs)

    def take_seen(self) -> Tree:
        """The output that was set aside, once; None if there is none."""
        seen, self._seen = self._seen, None
        return seen

    def close(self, begin: int, end: int) -> None:
        """Fold the piece into the run, or into the window's constant part."""
        piece = self._piece
        first_run = self._loss.weigh(begin, end, piece)
        if piece.total is None:  # nothing was added, or nothing that counts
            return
        self._piece = self._loss.new_sum()
        if self._graph:
            self.losses.add(piece.total, 0.0, piece.factor)
        elif first_run and end <= self._start:
            self._loss.add(piece, constant=True)

    def tensors(self) -> list[Tensor]:
        """What is summed, if there is anything."""
        return [] if self.losses.total is None else [self.losses.total]


class LastOutput(Sink):
    """Keeps the output of the step before `stop`, whether it has a loss or not."""

    def __init__(self, stop: int) -> None:
        super().__init__()
        self._stop = stop

    def wanted(self, begin: int, end: int) -> range:
        """That one step."""
        return range(self._stop - 1, self._stop) if begin < self._stop <= end else range(0)

    def take_seen(self) -> Tree:
        """The output; None where the step has no weight."""
        return map_tensors(Tensor.detach, self.outputs.pop()) if self.outputs else None


def _last(tensor: Tensor, time_dim: int | None) -> Tensor:
    """The last step of a segment; a step as it is."""
    return tensor if time_dim is None or tensor.dim() <= time_dim else tensor.select(time_dim, -1)
