"""The losses of many steps of a module of one step in one call, with time folded into the lanes.

A loss is called once a step, on what a step has. One of torch's whose value is a sum or a mean of
positions may be called on many steps at once, as if they were lanes: that says so for positions and
not for what the user's function does before, so that it is asked first, on two steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tbptt_ckpt.data.blocks import StepWeight, steps_of
from tbptt_ckpt.executor.loss_sum import LossSum
from tbptt_ckpt.executor.losses import LossFunction
from tbptt_ckpt.executor.segment_parts import folded
from tbptt_ckpt.executor.weighted_steps import check_lanes, equal_runs, lane_groups, narrow, select
from tbptt_ckpt.module.trees import Tree, map_tensors, tensors_of

_ROUNDING_BITS = 100  # by which two orders of a sum may differ


def folds(function: LossFunction, outputs: Tree, targets: Tree) -> bool:
    """Whether steps, with time first, may be given at once; asked where it is not known yet."""
    counting = function.counting
    if counting is None or counting.leaf is None or function.folds is False:
        return False
    tensors = [*tensors_of(outputs), *tensors_of(targets)]
    if not all(t.dim() > 1 and t.shape[:2] == tensors[0].shape[:2] for t in tensors):
        return False
    if function.asks_folding and tensors[0].shape[0] > 1:
        function.learn_folding(_asked(function, outputs, targets))
    return bool(function.folds)


def add_folded(
    function: LossFunction,
    losses: LossSum,
    outputs: Tree,
    targets: Tree,
    weights: Sequence[StepWeight] | None,
) -> None:
    """Add the losses of consecutive steps, in as few calls as their weights allow."""
    num_steps = tensors_of(outputs)[0].shape[0]
    for begin, end, weight in equal_runs(weights, num_steps):
        part = narrow((outputs, targets), begin, end, num_steps, 0)
        check_lanes(part, weight, 1)
        for value, lanes in lane_groups(weight):
            chosen = part if lanes is None else select(part, lanes, 1)
            count = (end - begin) * (1 if lanes is None else len(lanes))
            share = 1.0 if isinstance(weight, float) else float(len(weight))
            function.add_part(losses, folded(chosen), count, share, value)


def _asked(function: LossFunction, outputs: Tree, targets: Tree) -> bool | None:
    """Whether two steps have the same loss together and one by one; None if nothing counts."""
    source = torch.Generator().manual_seed(0)
    # Numbers of its own: what mixes lanes does not show where all outputs are alike, as at first.
    drawn = map_tensors(lambda t: _drawn(t[:2], source), outputs)
    few = drawn, map_tensors(lambda t: t[:2], targets)
    apart, together = LossSum(), LossSum()
    with torch.no_grad():
        try:  # it may want a graph, and need not take more lanes
            for output, target in zip(*(steps_of(tree, 0, 2) for tree in few), strict=True):
                function.add_step(apart, output, target, 1.0)
            function.add_part(together, folded(few), 2, 1.0, 1.0)
        except (RuntimeError, ValueError, IndexError):
            return False
    return _agree(apart, together)


def _drawn(like: Tensor, source: torch.Generator) -> Tensor:
    """Numbers that may be probabilities, variances or anything else."""
    if not like.is_floating_point():
        return like
    made = torch.rand(like.shape, generator=source, dtype=torch.float64, device="cpu")
    return (0.1 + 0.8 * made).to(like.device, like.dtype)


def _agree(one: LossSum, other: LossSum) -> bool | None:
    mine, its = one.value(), other.value()
    if mine is None or its is None:
        return None if mine is its else False
    rounding = _ROUNDING_BITS * torch.finfo(mine.dtype).eps
    pairs = (mine, its), (one.weight, other.weight)
    return all(math.isclose(float(a), float(b), rel_tol=rounding) for a, b in pairs)
