"""Which steps and lanes a loss is called on, by their weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tbptt_ckpt.data.blocks import StepWeight
from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.module.host import sent
from tbptt_ckpt.module.trees import Tree, map_tensors, tensors_of


def check_lanes(tree: Tree, weight: StepWeight, dim: int) -> None:
    """Raise `ArgumentError` unless all tensors have the lanes of a weight."""
    if isinstance(weight, float):
        return
    for tensor in tensors_of(tree):
        if tensor.dim() <= dim or tensor.shape[dim] != len(weight):
            raise ArgumentError(
                f"weight has {len(weight)} lanes, but outputs and targets with lanes on "
                f"dimension {dim} are needed for it, and one has shape {tuple(tensor.shape)}"
            )


def lane_groups(weight: StepWeight) -> Iterator[tuple[float, list[int] | None]]:
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


def equal_runs(
    weights: Sequence[StepWeight] | None, num_steps: int
) -> Iterator[tuple[int, int, StepWeight]]:
    """Maximal runs `[begin, end)` of steps with the same weight."""
    begin = 0
    for end in range(1, num_steps + 1):
        if end == num_steps or (weights is not None and weights[end] != weights[begin]):
            yield begin, end, 1.0 if weights is None else weights[begin]
            begin = end


def narrow(tree: Tree, begin: int, end: int, num_steps: int, time_dim: int) -> Tree:
    """The steps `[begin, end)` of so many."""
    if end - begin == num_steps:
        return tree
    return map_tensors(lambda t: t.narrow(time_dim, begin, end - begin), tree)


def select(tree: Tree, lanes: list[int], dim: int) -> Tree:
    """Some lanes; copies, unless they are all."""

    def chosen(tensor: Tensor) -> Tensor:
        if len(lanes) == tensor.shape[dim]:
            return tensor
        return tensor.index_select(dim, sent(torch.tensor(lanes, device="cpu"), tensor.device))

    return map_tensors(chosen, tree)


def is_present(weight: StepWeight) -> bool:
    """Whether a step with this weight has a loss."""
    return bool(weight) if isinstance(weight, float) else any(weight)
