"""Which sequence runs in which lane at which step: plain integers, a function of the seed."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Words = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Piece:
    """Steps `[start, stop)` of a lane, which are those of one sequence from `offset` on."""

    lane: int
    sequence: int
    offset: int
    start: int
    stop: int


class LaneLayout:
    """Sequences one after another in lanes; the lane that ends first takes the next one."""

    def __init__(self, lengths: Integers, order: Integers, lanes: int) -> None:
        taken: list[list[int]] = [[] for _ in range(lanes)]
        ends = [(0, lane) for lane in range(lanes)]  # ties go to the lower lane
        for sequence in order.tolist():
            end, lane = ends[0]
            taken[lane].append(sequence)
            heapq.heapreplace(ends, (end + int(lengths[sequence]), lane))
        self.num_steps = max(end for end, _ in ends)
        self._sequences = [np.array(numbers, dtype=np.int64) for numbers in taken]
        # Edges of the sequences of each lane, from 0 to the lane's end.
        self._edges = [np.concatenate([[0], np.cumsum(lengths[n])]) for n in self._sequences]

    def pieces(self, start: int, stop: int) -> Iterator[Piece]:
        """What the steps `[start, stop)` hold, lane by lane; padding has no piece."""
        for lane, (sequences, edges) in enumerate(zip(self._sequences, self._edges, strict=True)):
            first = max(int(np.searchsorted(edges, start, side="right")) - 1, 0)
            for position in range(first, len(sequences)):
                begin, end = int(edges[position]), int(edges[position + 1])
                if begin >= stop:
                    break
                low, high = max(begin, start), min(end, stop)
                yield Piece(lane, int(sequences[position]), low - begin, low, high)


def shuffled(count: int, seed: int, epoch: int) -> Integers:
    """A permutation of `range(count)`: the same for the same seed and epoch, always.

    The numbers are sorted by a hash of their own (the finalizer of SplitMix64), so that the
    order does not hang on any library's random generator.

    References:
        Steele, Lea & Flood (2014), doi:10.1145/2714064.2660195.
    """
    # Modulo 2**64, as arrays compute.
    words: Words = np.array([[seed % 2**64], [epoch % 2**64]], dtype=np.uint64)
    key = _mixed(_mixed(words[0]) + words[1])
    numbers: Words = np.arange(count, dtype=np.uint64)
    return np.argsort(_mixed(key + numbers), kind="stable").astype(np.int64)


def _mixed(words: Words) -> Words:
    mixed = words + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
