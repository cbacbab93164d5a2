"""Makes blocks: of single steps, and of other blocks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tbptt_ckpt.data.blocks import Column, StepBlock
from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.module.trees import (
    Tree,
    iterate_leaves,
    join_trees,
    map_tensors,
    replace_tensors,
    structure,
    tensors_of,
)


def join_blocks(parts: Sequence[StepBlock]) -> StepBlock:
    """Consecutive blocks as one; copies only where there are several."""
    if len(parts) == 1:
        return parts[0]
    time_dim = parts[0].time_dim
    targets = [part.targets for part in parts]
    known = next((t for t in targets if t is not None), None)
    if known is not None:  # steps without a target get zeros, which their weight hides
        targets = [
            _zeros_like_steps(known, p.stop - p.start, time_dim) if t is None else t
            for t, p in zip(targets, parts, strict=True)
        ]
    return StepBlock(
        parts[0].start,
        parts[-1].stop,
        _concatenate([part.inputs for part in parts], time_dim),
        None if known is None else _concatenate(targets, time_dim),
        _joined_weight(parts),
        time_dim,
    )


def pack_steps(steps: Sequence[tuple[Any, Any]], start: int) -> StepBlock:
    """A block of `(input, target)` steps; a target None is absent."""
    targets = [target for _, target in steps]
    known = next((t for t in targets if t is not None), None)
    weight = None
    if known is not None and any(t is None for t in targets):
        weight = torch.tensor(
            [0.0 if t is None else 1.0 for t in targets], dtype=torch.float64, device="cpu"
        )
        blank = map_tensors(torch.zeros_like, known)
        targets = [blank if t is None else t for t in targets]
    return StepBlock(
        start,
        start + len(steps),
        _pack([given for given, _ in steps]),
        None if known is None else _pack(targets),
        weight,
        0,
    )


def _pack(values: list[Any]) -> Tree:
    leaves = [tensors_of(value) for value in values]
    first = structure(values[0])
    if leaves[0] and all(structure(value) == first for value in values):
        columns = list(zip(*leaves, strict=True))
        # A leaf that is no tensor may differ from step to step.
        only_tensors = all(isinstance(leaf, Tensor) for leaf in iterate_leaves(values[0]))
        alike = all(len({(t.shape, t.dtype, t.device) for t in c}) == 1 for c in columns)
        if only_tensors and alike:
            return replace_tensors(values[0], [torch.stack(column) for column in columns])
    return Column(tuple(values))


def _concatenate(trees: Sequence[Tree], time_dim: int) -> Tree:
    if any(isinstance(tree, Column) for tree in trees):
        raise ArgumentError(
            "inputs and targets of a segment module must be tensors of one shape and type at "
            "every step; use per_step=True for others"
        )
    return join_trees(partial(torch.cat, dim=time_dim), trees)


def _zeros_like_steps(tree: Tree, num_steps: int, time_dim: int) -> Tree:
    def zeros(tensor: Tensor) -> Tensor:
        return tensor.new_zeros(
            (*tensor.shape[:time_dim], num_steps, *tensor.shape[time_dim + 1 :])
        )

    return map_tensors(zeros, tree)


def _joined_weight(parts: Sequence[StepBlock]) -> Tensor | None:
    if all(p.weight is None and p.targets is not None for p in parts):
        return None
    lanes = next((p.weight.shape[1:] for p in parts if p.weight is not None), torch.Size())
    rows = []
    for part in parts:
        if part.targets is not None and part.weight is not None:
            rows.append(part.weight)
        else:
            value = 0.0 if part.targets is None else 1.0
            shape = (part.stop - part.start, *lanes)
            rows.append(torch.full(shape, value, dtype=torch.float64, device="cpu"))
    return torch.cat(rows)
