"""Reads steps into blocks, from an iterable or from a source."""

from __future__ import annotations

import io
import mmap
from collections.abc import Iterable, Iterator, Sized
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader

from tbptt_ckpt.data.batches import Batches
from tbptt_ckpt.data.blocks import StepBlock
from tbptt_ckpt.data.packing import pack_steps
from tbptt_ckpt.data.source import (
    Source,
    as_tensors,
    check_time_exists,
    checked_resets,
    checked_weight,
    for_module,
    rows_of,
)
from tbptt_ckpt.data.tensors import TensorSequence
from tbptt_ckpt.errors import ArgumentError, shown
from tbptt_ckpt.module.recurrence import Recurrence, following_time_dim
from tbptt_ckpt.module.trees import Tree, iterate_tensors, tensors_of


class StepIterable:
    """An iterable of `(input, target)` steps, read once from front to back."""

    time_dim = 0

    def __init__(self, steps: Iterable[Any]) -> None:
        self._iterator: Iterator[Any] = iter(steps)
        self.position = 0
        self.num_steps = length_of(steps)

    def read_block(self, start: int, stop: int) -> StepBlock | None:
        """The next steps, packed; fewer than asked at the end, None if there are none."""
        assert start == self.position, "steps are read in order"
        steps = []
        for item in islice(self._iterator, stop - start):
            steps.append(_checked_step(item, self.position))
            self.position += 1
        if self.position == self.num_steps and next(self._iterator, None) is not None:
            raise ArgumentError(
                f"the sequence has length {self.num_steps} but there are more steps than that"
            )
        return pack_steps(steps, start) if steps else None

    def skip_to(self, step: int) -> None:
        """Pass over steps that were read before."""
        while self.position < step:
            if next(self._iterator, self) is self:
                raise ArgumentError(
                    f"the sequence ended after {self.position} steps, but it had {step} when its "
                    "state was saved; iterate it anew from its first step to go on"
                )
            self.position += 1


class SourceReader:
    """Reads a user's source into blocks."""

    def __init__(self, source: Source, recurrence: Recurrence) -> None:
        self.source = for_module(source, recurrence)
        follows = recurrence.layer is not None and not hasattr(self.source, "time_dim")
        self._followed = recurrence.time_dim if follows else 0  # until a first read
        self.time_dim: int = getattr(self.source, "time_dim", self._followed)
        self.num_steps = length_of(self.source)

    def read_block(self, start: int, stop: int) -> StepBlock | None:
        """The steps `[start, stop)`; fewer only where the source ends and has no length."""
        result = self.source.read(start, stop)
        if not isinstance(result, tuple | list) or len(result) != 2:
            raise ArgumentError(
                f"the source's read({start}, {stop}) must return (inputs, targets), "
                f"not {type(result).__name__}"
            )
        inputs, targets = as_tensors(result[0]), as_tensors(result[1])
        if self._followed:
            self._follow(inputs, start, stop)
        length = self._length(inputs, targets, start, stop)
        if length != stop - start and (self.num_steps is not None or length > stop - start):
            raise ArgumentError(
                f"the source's read({start}, {stop}) returned {length} steps on "
                f"time_dim={self.time_dim}"
            )
        if not length:
            return None
        end = start + length
        return StepBlock(
            start,
            end,
            inputs,
            targets,
            checked_weight(rows_of(self.source, "weights", start, end), length),
            self.time_dim,
            checked_resets(rows_of(self.source, "resets", start, end), length),
        )

    def _follow(self, inputs: Tree, start: int, stop: int) -> None:
        """Have time where the module has it, unless the first inputs may have it elsewhere."""
        self.time_dim, self._followed = following_time_dim(self._followed, inputs), 0
        shapes, length = [tuple(tensor.shape) for tensor in tensors_of(inputs)], stop - start
        if self.time_dim and shapes and (shapes[0][0] == length or shapes[0][1] > length):
            raise ArgumentError(
                f"the source's read({start}, {stop}) returned inputs of shape {shapes[0]} and it "
                "does not say where they have time, which the module has on dimension 1 "
                "(batch_first=True): give the source an attribute time_dim, 0 or 1"
            )

    def _length(self, inputs: Tree, targets: Tree, start: int, stop: int) -> int:
        if not tensors_of(inputs):
            return 0
        shapes = {}
        for name, tree in (("inputs", inputs), ("targets", targets)):
            for tensor in tensors_of(tree):
                check_time_exists(name, tensor, self.time_dim)
                shapes[tensor.shape[self.time_dim]] = name, tensor.shape
        if len(shapes) > 1:
            found = " and ".join(f"{name} of shape {tuple(s)}" for name, s in shapes.values())
            raise ArgumentError(
                f"the source's read({start}, {stop}) returned {found}, "
                f"which differ in their steps on time_dim={self.time_dim}"
            )
        return next(iter(shapes))


class NoSteps:
    """The sequence of a rank that has none, where others have one."""

    def __len__(self) -> int:
        return 0

    def read(self, start: int, stop: int) -> tuple[Tree, Tree]:
        """Nothing."""
        return (), None

    def state_dict(self) -> dict[str, Any]:
        """By which it is known."""
        return {"has_no_steps": True}


def reader_for(sequence: Any, recurrence: Recurrence) -> StepIterable | SourceReader:
    """The reader of a user's sequence for a module."""
    check_sequence(sequence)
    if isinstance(sequence, Batches):
        raise ArgumentError(
            f"sequence={sequence!r} is many sequences: give it to a Trainer, or run each of them: "
            "for sequence in batches: tbptt.train(sequence)"
        )
    return (
        SourceReader(sequence, recurrence)
        if isinstance(sequence, Source)
        else StepIterable(sequence)
    )


def check_sequence(sequence: Any) -> None:
    """Raise `ArgumentError` unless this is a sequence, or `Batches` of them."""
    if isinstance(sequence, io.IOBase):
        raise ArgumentError(
            f"sequence={shown(sequence)} is an open file; pass steps, a TensorSequence or a source"
        )
    if isinstance(sequence, mmap.mmap):  # has a read(), but of bytes
        raise ArgumentError(
            "sequence is an mmap.mmap, which has bytes but no steps; map the file with "
            "map_file(path, dtype, step_shape) or np.memmap, and pass ArraySequence(array)"
        )
    if isinstance(sequence, TensorSequence):
        _check_usable(sequence.inputs, sequence.targets)
    if isinstance(sequence, PackedSequence):
        as_tensors(sequence)  # raises
    if isinstance(sequence, Tensor | np.ndarray):
        raise ArgumentError(
            f"sequence is a {type(sequence).__name__} of shape {tuple(sequence.shape)}; wrap it: "
            "TensorSequence(inputs, targets)"
        )
    if isinstance(sequence, DataLoader) and sequence.batch_sampler is not None:
        raise ArgumentError(
            "sequence is a DataLoader of batches, each of which would be one step; where it has "
            "whole sequences, Trainer(tbptt, Batches(loader, time_dim=1)) runs them one after the "
            "other, or give LaneSource the sequences; batch_size=None where the items are steps"
        )
    if not isinstance(sequence, Source | Iterable):
        raise ArgumentError(
            f"sequence={shown(sequence)} is neither an iterable of (input, target) steps, nor a "
            "TensorSequence, nor a source with read(start, stop)"
        )


def _checked_step(item: Any, step: int) -> tuple[Any, Any]:
    if isinstance(item, tuple | list) and len(item) == 2:
        inputs, target = as_tensors(item[0]), as_tensors(item[1])
        _check_usable(inputs, target)
        return inputs, target
    raise ArgumentError(
        f"step {step} of the sequence is a {type(item).__name__}, not a pair (input, target); "
        "for whole tensors use TensorSequence(inputs, targets)"
    )


def _check_usable(inputs: Tree, targets: Tree) -> None:
    for name, tree in (("inputs", inputs), ("targets", targets)):
        for tensor in iterate_tensors(tree):
            if tensor.grad_fn is not None:
                raise ArgumentError(
                    f"{name} were computed with a graph, which every window would have to "
                    "differentiate again; detach them, or move what computes them into the module"
                )
            if tensor.is_inference():
                raise ArgumentError(
                    f"{name} hold tensors of torch.inference_mode, which cannot be "
                    "differentiated; clone them outside of it"
                )


def length_of(sequence: object) -> int | None:
    """Its steps; None where it does not know."""
    if not isinstance(sequence, Sized):
        return None
    try:
        return len(sequence)
    except (TypeError, NotImplementedError):  # a DataLoader of a stream has __len__, and raises
        return None
