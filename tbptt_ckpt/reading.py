"""Reads a sequence window by window, and finds out where it ends."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sized
from typing import Any

import numpy as np
from torch import Tensor

from tbptt_ckpt.blocks import StepBlock
from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.packing import pack_steps
from tbptt_ckpt.sources import (
    Source,
    TensorSequence,
    as_tensors,
    check_time_exists,
    checked_resets,
    checked_weight,
    rows_of,
)
from tbptt_ckpt.state import Tree, iterate_tensors, tensors_of


class StepIterable:
    """An iterable of `(input, target)` steps, read once from front to back.

    Args:
        steps: The iterable; its length is used where it has one.
    """

    time_dim = 0

    def __init__(self, steps: Iterable[Any]) -> None:
        self._iterator: Iterator[Any] = iter(steps)
        self.position = 0
        self.num_steps = len(steps) if isinstance(steps, Sized) else None

    def read_block(self, start: int, stop: int) -> StepBlock | None:
        """The next steps, packed; fewer than asked at the end, None if there are none."""
        assert start == self.position, "steps are read in order"
        steps = []
        for item in self._iterator:
            steps.append(_checked_step(item, self.position))
            self.position += 1
            if self.position == stop:
                break
        if self.position == self.num_steps and next(self._iterator, None) is not None:
            raise ArgumentError(
                f"the sequence has length {self.num_steps} but there are more steps than that"
            )
        return pack_steps(steps, start) if steps else None


class SourceReader:
    """Reads a user's source into blocks."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.time_dim: int = getattr(source, "time_dim", 0)
        self.num_steps = _length_of(source)

    def read_block(self, start: int, stop: int) -> StepBlock | None:
        """The steps `[start, stop)`; fewer only where the source ends and has no length."""
        result = self.source.read(start, stop)
        if not isinstance(result, tuple | list) or len(result) != 2:
            raise ArgumentError(
                f"the source's read({start}, {stop}) must return (inputs, targets), "
                f"not {type(result).__name__}"
            )
        inputs, targets = as_tensors(result[0]), as_tensors(result[1])
        length = self._length(inputs, targets, start, stop)
        if length != stop - start and (self.num_steps is not None or length > stop - start):
            raise ArgumentError(
                f"the source's read({start}, {stop}) returned {length} steps on "
                f"time_dim={self.time_dim}"
            )
        if not length:
            return None
        weight = rows_of(self.source, "weights", start, start + length)
        resets = rows_of(self.source, "resets", start, start + length)
        return StepBlock(
            start,
            start + length,
            inputs,
            targets,
            None if weight is None else checked_weight(weight, length),
            self.time_dim,
            None if resets is None else checked_resets(resets, length),
        )

    def _length(self, inputs: Tree, targets: Tree, start: int, stop: int) -> int:
        if not tensors_of(inputs):
            return 0
        lengths = {}
        for name, tree in (("inputs", inputs), ("targets", targets)):
            for tensor in tensors_of(tree):
                check_time_exists(name, tensor, self.time_dim)
                lengths[tensor.shape[self.time_dim]] = f"{name} of shape {tuple(tensor.shape)}"
        if len(lengths) > 1:
            raise ArgumentError(
                f"the source's read({start}, {stop}) returned {' and '.join(lengths.values())}, "
                f"which differ in their steps on time_dim={self.time_dim}"
            )
        return next(iter(lengths))


class WindowReader:
    """Holds the steps of the current window and finds out where the sequence ends.

    A source with a length is read window by window. One without is read in order, up to
    `k1` steps ahead, and its steps are held until no window needs them.
    """

    # Steps packed into tensors at a time: one tensor per step would cost over a kilobyte
    # of host memory each.
    PACK_STEPS = 256

    def __init__(self, sequence: object, k1: int, k2: int | None) -> None:
        self._k1, self._k2 = k1, k2
        self._reader = _reader_for(sequence)
        self.num_steps = self._reader.num_steps
        self._in_order = self.num_steps is None or isinstance(self._reader, StepIterable)
        self._held: list[StepBlock] = []
        self._position = 0
        if self.num_steps == 0:
            raise ArgumentError("the sequence is empty; at least one step is needed")

    def drop_before(self, step: int) -> None:
        """Forget steps that no later window needs."""
        self._held = [block for block in self._held if block.stop > step]

    def look_ahead(self, stop: int) -> None:
        """Make sure that the end is known if it lies before `stop`."""
        if self.num_steps is None:
            self._pull(stop)
            if self.num_steps == 0:
                raise ArgumentError("the sequence is empty; at least one step is needed")

    def window(self, first: int, stop: int) -> list[StepBlock]:
        """The steps `[first, stop)` in blocks; blocks at the ends may reach further."""
        if not self._in_order:
            block = self._reader.read_block(first, stop)
            assert block is not None, "a source with a length has its steps"
            return [block]
        self.drop_before(first)
        self._pull(stop)
        return [block for block in self._held if block.start < stop]

    def _pull(self, stop: int) -> None:
        while self._position < stop and (self.num_steps is None or self._position < self.num_steps):
            wanted = min(self._position + self.PACK_STEPS, stop, self._next_start())
            block = self._reader.read_block(self._position, wanted)
            if block is not None:
                self._held.append(block)
                self._position = block.stop
            if block is None or block.stop < wanted:
                self._end()

    def _next_start(self) -> int:
        """The next step at which a window may start: a block must not reach across it."""
        if self._k2 is None:
            return self._position + self.PACK_STEPS
        return self._position + self._k1 - (self._position + self._k2) % self._k1

    def _end(self) -> None:
        if self.num_steps is not None:
            raise ArgumentError(
                f"the sequence has length {self.num_steps} but ended after {self._position} steps"
            )
        self.num_steps = self._position


def _reader_for(sequence: object) -> StepIterable | SourceReader:
    if isinstance(sequence, io.IOBase):
        raise ArgumentError(
            f"sequence={sequence!r} is an open file; pass steps, a TensorSequence or a source"
        )
    if isinstance(sequence, TensorSequence):
        _check_usable(sequence.inputs, "inputs")
        _check_usable(sequence.targets, "targets")
    if isinstance(sequence, Source):
        return SourceReader(sequence)
    if isinstance(sequence, Tensor | np.ndarray):
        raise ArgumentError(
            f"sequence is a {type(sequence).__name__} of shape {tuple(sequence.shape)}; wrap it: "
            "TensorSequence(inputs, targets)"
        )
    if isinstance(sequence, Iterable):
        return StepIterable(sequence)
    raise ArgumentError(
        f"sequence={sequence!r} is neither an iterable of (input, target) steps, nor a "
        "TensorSequence, nor a source with read(start, stop)"
    )


def _checked_step(item: Any, step: int) -> tuple[Any, Any]:
    if isinstance(item, tuple | list) and len(item) == 2:
        inputs, target = as_tensors(item[0]), as_tensors(item[1])
        _check_usable(inputs, "inputs")
        _check_usable(target, "targets")
        return inputs, target
    raise ArgumentError(
        f"step {step} of the sequence is a {type(item).__name__}, not a pair (input, target); "
        "for whole tensors use TensorSequence(inputs, targets)"
    )


def _check_usable(tree: Tree, name: str) -> None:
    if any(tensor.grad_fn is not None for tensor in iterate_tensors(tree)):
        raise ArgumentError(
            f"{name} were computed with a graph, which every window would have to differentiate "
            "again; detach them, or move what computes them into the module"
        )
    if any(tensor.is_inference() for tensor in iterate_tensors(tree)):
        raise ArgumentError(
            f"{name} hold tensors of torch.inference_mode, which cannot be differentiated; clone "
            "them outside of it"
        )


def _length_of(source: object) -> int | None:
    return len(source) if isinstance(source, Sized) else None
