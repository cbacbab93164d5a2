"""Sequences of any lengths side by side: lanes that are refilled as they end."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tbptt_ckpt.arguments import Dimension, PositiveInt, check_dimension, checked
from tbptt_ckpt.data.layout import FreshLanes, Integers, LaneLayout, Piece, shuffled
from tbptt_ckpt.data.source import Source, as_tensors, check_range, check_same_source, rows_of
from tbptt_ckpt.errors import ArgumentError, shown
from tbptt_ckpt.memory.available import Device
from tbptt_ckpt.module.host import sent
from tbptt_ckpt.module.trees import Tree, replace_tensors, structure, tensors_of


class LaneSource:
    """One long sequence, or many of different lengths, as parallel lanes.

    A lane that ends takes the next sequence at once, and resets at that sequence's first step,
    wherever in a window it falls. The lane that ends first takes the next one. Once no sequence
    is left, lanes that have ended hold zeros of weight zero: padding, of which there is at most
    as much as the longest sequence in each lane. No step is left out or read twice.

    A step has a weight per lane, so that losses are summed, and a mean divides, over steps of
    lanes: over B of them in a step that all lanes run.

    Args:
        sequences: Sources with a length and without lanes, whose inputs are [T, ...]; or one
            such source.
        lanes: Number of lanes, B. Inputs and targets that are read are [n, B, ...].
        lengths: With one source, the lengths of the sequences that follow each other in it;
            by default it is cut into one stretch per lane, as equal as can be.
        seed: Shuffles the sequences, anew in each epoch; None keeps their order.
        fresh_lanes: So many of the lanes, the last ones, are not continued: every `fresh_steps`
            steps each begins, with a reset, a stretch that is drawn from all stretches of so many
            steps in the sequences. An epoch has the steps that the other lanes take.
        fresh_steps: Steps of such a stretch.
        device: Where `read` puts its tensors; by default they stay where they are.

    Raises:
        ArgumentError: Sequences that are empty, have no length, or cannot fill the lanes.
    """

    time_dim = 0

    @checked
    def __init__(
        self,
        sequences: Any,
        lanes: PositiveInt,
        *,
        lengths: Iterable[int] | None = None,
        seed: int | None = None,
        fresh_lanes: Dimension = 0,
        fresh_steps: PositiveInt | None = None,
        device: Device | None = None,
    ) -> None:
        self._lasting = lanes - fresh_lanes
        _check_fresh(lanes, fresh_lanes, fresh_steps, seed)
        if isinstance(sequences, Source):
            self._lengths = _stretch_lengths(sequences, self._lasting, lengths)
            self._starts = np.cumsum(self._lengths) - self._lengths
            self._sources: Sequence[Source] = [sequences] * len(self._starts)
        elif lengths is not None:
            raise ArgumentError("lengths cut one source; with several, each has its own length")
        else:
            self._lengths, self._sources = _lengths_of(sequences), sequences
            self._starts = np.zeros_like(self._lengths)
        if not len(self._lengths):
            raise ArgumentError("sequences are empty; at least one is needed")
        if self._lengths.min() < 1:
            raise ArgumentError(f"sequence {int(self._lengths.argmin())} is empty; leave it out")
        if fresh_steps is not None and self._lengths.max() < fresh_steps:
            raise ArgumentError(
                f"fresh_steps={fresh_steps} is more than the longest sequence has, which is "
                f"{int(self._lengths.max())} steps"
            )
        self.lanes, self._seed, self._device = lanes, seed, device
        self._fresh_steps = fresh_steps
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Lay the sequences out for a pass over them: with a seed, each epoch has its order."""
        order = np.arange(len(self._lengths), dtype=np.int64)
        if self._seed is not None:
            order = shuffled(len(order), self._seed, epoch)
        self.epoch = epoch
        self._layout = LaneLayout(self._lengths, order, self._lasting)
        self._fresh: FreshLanes | None = None
        if self._fresh_steps is not None:
            lanes, seed = range(self._lasting, self.lanes), self._seed or 0
            self._fresh = FreshLanes(self._lengths, lanes, self._fresh_steps, seed, epoch)

    def __len__(self) -> int:
        return self._layout.num_steps

    def __repr__(self) -> str:
        sequences = f"{len(self._lengths):,} sequences in {self.lanes:,} lanes"
        order = "in order" if self._seed is None else f"shuffled by seed {self._seed}"
        fresh = ""
        if self._fresh is not None:
            number = self.lanes - self._lasting
            fresh = f", {number:,} of them fresh every {self._fresh_steps:,} steps"
        return f"LaneSource({sequences}{fresh}, {len(self):,} steps, {order})"

    def read(self, start: int, stop: int) -> tuple[Tree, Tree]:
        """Inputs and targets of the steps `[start, stop)`, each [stop - start, lanes, ...]."""
        return self.read_lanes(start, stop, slice(0, self.lanes))

    def read_lanes(self, start: int, stop: int, lanes: slice) -> tuple[Tree, Tree]:
        """The same of some lanes only, which is all that is read.

        Where they are padding only, a step of another lane says what their zeros look like.
        """
        check_range(start, stop, len(self))
        number = lanes.stop - lanes.start
        inputs = _LaneBatch("inputs", start, stop, number)
        targets = _LaneBatch("targets", start, stop, number)
        pieces = list(self._pieces(start, stop))
        own = [piece for piece in pieces if lanes.start <= piece.lane < lanes.stop]
        for piece in own:
            self._read(replace(piece, lane=piece.lane - lanes.start), inputs, targets)
        if not own:
            first = pieces[0].start
            self._read(replace(pieces[0], lane=0, stop=first + 1), inputs, targets)
            inputs.clear()
            targets.clear()
        return inputs.result(self._device), targets.result(self._device)

    def weights(self, start: int, stop: int) -> Tensor:
        """[n, lanes]: the sequences' own weights, or one; zero in padding."""
        weights = torch.zeros(stop - start, self.lanes, dtype=torch.float64, device="cpu")
        for piece in self._pieces(start, stop):
            rows = self._rows_of(piece, "weights")
            weights[piece.start - start : piece.stop - start, piece.lane] = (
                1.0 if rows is None else rows
            )
        return weights

    def resets(self, start: int, stop: int) -> Tensor:
        """[n, lanes]: where a lane begins a sequence, or the sequence itself has a reset."""
        resets = torch.zeros(stop - start, self.lanes, dtype=torch.bool, device="cpu")
        for piece in self._pieces(start, stop):
            rows = self._rows_of(piece, "resets")
            if rows is not None:
                resets[piece.start - start : piece.stop - start, piece.lane] = rows
            if piece.begins:
                resets[piece.start - start, piece.lane] = True
        return resets

    def state_dict(self) -> dict[str, Any]:
        """The epoch, and what identifies the lanes; a read depends on its arguments alone."""
        lengths = self._lengths.astype("<i8").tobytes()
        return {
            "epoch": self.epoch,
            "seed": self._seed,
            "lanes": self.lanes,
            "num_sequences": len(self._lengths),
            "lengths_sha256": hashlib.sha256(lengths).hexdigest(),
            **({"fresh": [self.lanes - self._lasting, self._fresh_steps]} if self._fresh else {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the epoch at which `state_dict` of equal lanes was called.

        Raises:
            ArgumentError: The lanes are not the same.
        """
        check_same_source({**state, "epoch": None}, {**self.state_dict(), "epoch": None})
        self.set_epoch(state["epoch"])

    def _pieces(self, start: int, stop: int) -> Iterator[Piece]:
        yield from self._layout.pieces(start, stop)
        if self._fresh is not None:
            yield from self._fresh.pieces(start, stop)

    def _read(self, piece: Piece, inputs: _LaneBatch, targets: _LaneBatch) -> None:
        """Put a piece into both; what its source made for it is gone before the next one."""
        source, low, high = self._range_of(piece)
        read, time_dim = source.read(low, high), getattr(source, "time_dim", 0)
        inputs.put(piece, as_tensors(read[0]), time_dim)
        targets.put(piece, as_tensors(read[1]), time_dim)

    def _range_of(self, piece: Piece) -> tuple[Source, int, int]:
        """The source of a piece and the range to read there."""
        low = int(self._starts[piece.sequence]) + piece.offset
        return self._sources[piece.sequence], low, low + piece.stop - piece.start

    def _rows_of(self, piece: Piece, method: str) -> Tensor | None:
        source, low, high = self._range_of(piece)
        rows = rows_of(source, method, low, high)
        if rows is not None and rows.dim() != 1:
            raise ArgumentError(
                f"{method} of a sequence in a LaneSource have shape {tuple(rows.shape)}; a "
                f"sequence has no lanes of its own, so they must be [{high - low}]"
            )
        return rows


def _lengths_of(sources: Sequence[Source]) -> Integers:
    if not isinstance(sources, Sequence):
        raise ArgumentError(
            f"sequences={shown(sources)} must be a source, or a list of sources with a length"
        )
    for number, source in enumerate(sources):
        if not isinstance(source, Source):
            raise ArgumentError(
                f"sequence {number} is a {type(source).__name__}, not a source; wrap tensors: "
                "TensorSequence(inputs, targets)"
            )
    lengths = [_check_source(source, f"sequence {n}") for n, source in enumerate(sources)]
    return np.array(lengths, dtype=np.int64)


class _LaneBatch:
    """Inputs or targets of some steps of all lanes, put together piece by piece."""

    def __init__(self, name: str, start: int, stop: int, lanes: int) -> None:
        self._name, self._start, self._shape = name, start, (stop - start, lanes)
        self._tree: Tree = None  # of the first piece
        self._tensors: list[Tensor] | None = None

    def put(self, piece: Piece, tree: Tree, time_dim: int) -> None:
        """Fill in a piece of one lane."""
        rows = [tensor.movedim(time_dim, 0) for tensor in tensors_of(tree)]
        if self._tensors is None:
            self._tree = tree
            self._tensors = [row.new_zeros(self._shape + row.shape[1:]) for row in rows]
        if structure(tree) != structure(self._tree):
            raise ArgumentError(
                f"{self._name} of sequence {piece.sequence} are {structure(tree)}, those of others "
                f"are {structure(self._tree)}; where targets are absent, give them weight zero"
            )
        low, high = piece.start - self._start, piece.stop - self._start
        for row, whole in zip(rows, self._tensors, strict=True):
            if row.shape[1:] != whole.shape[2:] or row.dtype != whole.dtype:
                raise ArgumentError(
                    f"{self._name} of sequence {piece.sequence} have steps of shape "
                    f"{tuple(row.shape[1:])} and dtype {row.dtype}, those of others "
                    f"{tuple(whole.shape[2:])} and {whole.dtype}"
                )
            whole[low:high, piece.lane] = row

    def clear(self) -> None:
        """Have zeros only."""
        for tensor in self._tensors or ():
            tensor.zero_()

    def result(self, device: torch.device | str | None) -> Tree:
        """The tree of tensors [n, B, ...]."""
        assert self._tensors is not None, "some lane runs at every step"
        if device is None:
            return replace_tensors(self._tree, self._tensors)
        return replace_tensors(self._tree, [sent(t, torch.device(device)) for t in self._tensors])


def _check_fresh(lanes: int, fresh: int, steps: int | None, seed: int | None) -> None:
    if fresh >= lanes:
        raise ArgumentError(
            f"fresh_lanes={fresh} must be fewer than lanes={lanes}: the others say how many steps "
            "there are"
        )
    if (fresh > 0) != (steps is not None):
        raise ArgumentError(
            f"fresh_lanes={fresh} and fresh_steps={steps} go together, such as fresh_lanes=1, "
            "fresh_steps=64"
        )
    if fresh and seed is None:
        raise ArgumentError(f"fresh_lanes={fresh} are drawn: give a seed, such as seed=0")


def _stretch_lengths(source: Source, lanes: int, lengths: Iterable[int] | None) -> Integers:
    num_steps = _check_source(source, "sequences")
    if lengths is None:
        if num_steps < lanes:
            raise ArgumentError(f"{num_steps} steps are too few for lanes={lanes}")
        short, longer = divmod(num_steps, lanes)
        return np.array([short + (lane < longer) for lane in range(lanes)], dtype=np.int64)
    found = np.asarray(list(lengths))
    if found.dtype.kind not in "iu" or found.ndim != 1:
        raise ArgumentError("lengths must be integers, one per sequence")
    if found.sum() != num_steps:
        raise ArgumentError(
            f"lengths sum to {int(found.sum())}, but the sequence has {num_steps} steps"
        )
    return found.astype(np.int64)


def _check_source(source: Source, name: str) -> int:
    if not isinstance(source, Sized):
        raise ArgumentError(f"{name} has no length, so lanes cannot be laid out; give it __len__")
    check_dimension("time_dim", getattr(source, "time_dim", 0))
    return len(source)
