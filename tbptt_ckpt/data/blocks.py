"""Consecutive steps packed into tensors: read step by step or as a segment, cut, and stored."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.module.trees import Tree, detach_state, map_tensors, replace_tensors, tensors_of

# The weight of one step: a number, or one number per lane.
StepWeight = float | Sequence[float]
# What a stored block may consist of, besides tuples, lists and dicts.
_PLAIN = (int, float, complex, bool, str, bytes, type(None), Tensor)
# Views made at a time when a block is read step by step; each costs host memory.
_VIEWS = 256
# Weights or resets looked at together: a look takes as much as they do, and windows are long.
_LOOKED_AT = 1 << 10


@dataclass(frozen=True, slots=True)
class Column:
    """Values of consecutive steps that cannot be one tensor: other types, other shapes."""

    values: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class StepBlock:
    """The steps `[start, stop)`; weights and resets are [n] or [n, B] on the CPU."""

    start: int
    stop: int
    inputs: Tree  # nested tensors with time on `time_dim`, or a `Column`
    targets: Tree  # the same; None where no step has a target
    weight: Tensor | None  # zero where a target is absent; None stands for ones
    time_dim: int
    resets: Tensor | None = None  # steps that begin a sequence, in every lane or in each

    def part(self, start: int, stop: int) -> StepBlock:
        """The steps `[start, stop)` of the block, as views."""
        if (start, stop) == (self.start, self.stop):
            return self
        low, high = start - self.start, stop - self.start
        return StepBlock(
            start,
            stop,
            _slice(self.inputs, low, high, self.time_dim),
            _slice(self.targets, low, high, self.time_dim),
            None if self.weight is None else self.weight[low:high],
            self.time_dim,
            None if self.resets is None else self.resets[low:high],
        )

    def with_time_first(self) -> StepBlock:
        """The same as views with time on dimension 0."""
        if self.time_dim == 0:
            return self
        inputs, targets = (to_time_dim(t, self.time_dim, 0) for t in (self.inputs, self.targets))
        return replace(self, inputs=inputs, targets=targets, time_dim=0)

    def copied(self) -> StepBlock:
        """The same with inputs and targets of their own."""
        inputs, targets = map_tensors(torch.clone, (self.inputs, self.targets))
        return replace(self, inputs=inputs, targets=targets)

    def num_bytes(self) -> int:
        """Bytes of all that the steps come with, as far as they are these steps'."""
        found = tensors_of((self.inputs, self.targets, self.weight, self.resets))
        return sum(tensor.nbytes for tensor in found)

    def weighs(self) -> bool:
        """Whether lanes are left out of a step, or weigh otherwise than in the one before."""
        if self.weight is None:
            return False
        last: Tensor | None = None
        for rows in few_rows(self.weight):
            lanes = rows.reshape(len(rows), -1)
            leaves_out = (lanes == 0).any(1) & (lanes != 0).any(1)
            changes = last is not None and not torch.equal(last, lanes[0])
            if changes or leaves_out.any() or (lanes[1:] != lanes[:-1]).any():
                return True
            last = lanes[-1]
        return False

    def reset_steps(self) -> list[int]:
        """Steps at which a lane begins a sequence."""
        return [] if self.resets is None else [self.start + row for row in true_rows(self.resets)]

    def with_resets(self, start: int) -> StepBlock:
        """The same with a reset at every step from `start` on."""
        return replace(self, resets=torch.arange(self.start, self.stop, device="cpu") >= start)

    def leaving_out_lanes(self) -> StepBlock:
        """The same with another lane left out of every step, where lanes have weights."""
        if self.weight is None or self.weight.dim() != 2 or self.weight.shape[1] < 2:
            return self
        weight, rows = torch.ones_like(self.weight), torch.arange(len(self.weight), device="cpu")
        weight[rows, rows % weight.shape[1]] = 0.0
        return replace(self, weight=weight)

    def step_weights(self) -> list[StepWeight] | None:
        """The weight of each step; None where every step has a target and weight one."""
        if self.targets is None:
            return [0.0] * (self.stop - self.start)
        return None if self.weight is None else self.weight.tolist()

    def has_loss(self) -> bool:
        """Whether any step has a target that counts."""
        if self.targets is None or self.weight is None:
            return self.targets is not None
        return any(bool(rows.any()) for rows in few_rows(self.weight))

    def weight_sum(self) -> float:
        """What the steps add to the divisor of a scalar loss."""
        if self.targets is None:
            return 0.0
        return float(self.stop - self.start if self.weight is None else self.weight.sum())

    def num_tokens(self) -> int:
        """Steps times lanes, without the lanes whose weight is zero."""
        if self.weight is not None and self.weight.dim() == 2:
            return int(torch.count_nonzero(self.weight))
        return (self.stop - self.start) * self.num_lanes()

    def num_lanes(self) -> int:
        """The first dimension of one step, where its inputs have one for lanes."""
        first = self.inputs.values[0] if isinstance(self.inputs, Column) else self.inputs
        tensors = tensors_of(first)
        if not tensors:
            return 1
        shape = list(tensors[0].shape)
        if not isinstance(self.inputs, Column):
            del shape[self.time_dim]
        is_one_lane = len(shape) == 1 and tensors[0].is_floating_point()  # its features
        return shape[0] if shape and not is_one_lane else 1

    def step_inputs(self) -> Iterator[Any]:
        """The input of each step, without its time dimension."""
        return steps_of(self.inputs, self.time_dim, self.stop - self.start)

    def step_targets(self) -> Iterator[Any]:
        """The target of each step, without its time dimension."""
        return steps_of(self.targets, self.time_dim, self.stop - self.start)


def few_rows(rows: Tensor) -> Sequence[Tensor]:
    """Weights or resets of steps in pieces, so that looking at them takes next to nothing."""
    lanes = max(1, rows[:1].numel())
    return torch.split(rows, max(1, _LOOKED_AT // lanes))


def true_rows(resets: Tensor) -> list[int]:
    """The rows of resets, [n] or [n, B], in which there is one."""
    found: list[int] = []
    first = 0
    for rows in few_rows(resets):
        flags = rows if rows.dim() == 1 else rows.any(1)
        found += [first + row for row in flags.nonzero().flatten().tolist()]
        first += len(rows)
    return found


def narrow_blocks(blocks: Sequence[StepBlock], start: int, stop: int) -> Iterator[StepBlock]:
    """The steps `[start, stop)`, block by block."""
    position = 0
    if len(blocks) > 1:
        position = bisect_right(blocks, start, key=lambda block: block.start) - 1
    while start < stop:
        block = blocks[position]
        end = min(stop, block.stop)
        yield block.part(start, end)
        start, position = end, position + 1


def to_time_dim(tree: Tree, source_dim: int, module_dim: int) -> Tree:
    """A view with time where the module wants it; tensors of one dimension stay."""
    if source_dim == module_dim:
        return tree

    def move(tensor: Tensor) -> Tensor:
        if tensor.dim() <= max(source_dim, module_dim):
            return tensor
        return tensor.movedim(source_dim, module_dim)

    return map_tensors(move, tree)


def _slice(tree: Tree, low: int, high: int, time_dim: int) -> Tree:
    if isinstance(tree, Column):
        return Column(tree.values[low:high])
    return map_tensors(lambda t: t.narrow(time_dim, low, high - low), tree)


def steps_of(tree: Tree, time_dim: int, num_steps: int) -> Iterator[Any]:
    """Each of so many steps, without its time dimension."""
    if isinstance(tree, Column):
        yield from tree.values
        return
    if tree is None:
        yield from repeat(None, num_steps)
        return
    for low in range(0, num_steps, _VIEWS):
        views = _slice(tree, low, min(low + _VIEWS, num_steps), time_dim)
        if isinstance(views, Tensor):
            yield from views.unbind(time_dim)
            continue
        columns: Iterable[Any] = (t.unbind(time_dim) for t in tensors_of(views))
        for leaves in zip(*columns, strict=True):
            yield replace_tensors(views, list(leaves))


def store_block(block: StepBlock) -> dict[str, Any]:
    """A block as containers of numbers, strings and tensors.

    Steps of other types, which could not be loaded without running code, are refused.
    """
    stored = {field.name: getattr(block, field.name) for field in fields(block)}
    return stored | {"inputs": _store(block.inputs), "targets": _store(block.targets)}


def load_block(stored: dict[str, Any]) -> StepBlock:
    """The block that was stored."""
    return StepBlock(
        **stored | {"inputs": _load(stored["inputs"]), "targets": _load(stored["targets"])}
    )


def _store(values: Tree) -> dict[str, Any]:
    is_column = isinstance(values, Column)
    plain = list(values.values) if is_column else values
    _check_plain(plain)
    return {"column" if is_column else "packed": detach_state(plain)}


def _load(stored: dict[str, Any]) -> Tree:
    return Column(tuple(stored["column"])) if "column" in stored else stored["packed"]


def _check_plain(tree: Tree) -> None:
    if type(tree) in (tuple, list, dict):
        for item in (*tree, *tree.values()) if type(tree) is dict else tree:
            _check_plain(item)
    elif not isinstance(tree, _PLAIN):
        raise ArgumentError(
            f"steps of a stream hold a {type(tree).__name__}, which cannot be stored; use tuples, "
            "lists, dicts, tensors, numbers and strings, or a source with a length"
        )
