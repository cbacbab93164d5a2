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
    """Steps `[start, stop)` of a lane, which are those of one sequence from `offset` on.

    `begins` says that the lane has a new state there.
    """

    lane: int
    sequence: int
    offset: int
    start: int
    stop: int
    begins: bool


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
                offset = low - begin
                yield Piece(lane, int(sequences[position]), offset, low, high, offset == 0)


class FreshLanes:
    """Lanes that are given another stretch of some sequence every so many steps.

    A stretch is drawn from all that there are, each as likely as any other, by a hash of the seed,
    the epoch, its lane and its number.
    """

    def __init__(self, lengths: Integers, lanes: range, steps: int, seed: int, epoch: int) -> None:
        self._lanes, self._steps = lanes, steps
        self._ends = np.cumsum(np.maximum(0, lengths - steps + 1))  # of the places to begin at
        self._key = _key(seed, epoch)

    def pieces(self, start: int, stop: int) -> Iterator[Piece]:
        """What the steps `[start, stop)` hold, lane by lane."""
        for lane in self._lanes:
            for number in range(start // self._steps, -(-stop // self._steps)):
                begin = number * self._steps
                low, high = max(begin, start), min(begin + self._steps, stop)
                sequence, offset = self._drawn(lane, number)
                yield Piece(lane, sequence, offset + low - begin, low, high, low == begin)

    def _drawn(self, lane: int, number: int) -> tuple[int, int]:
        """The sequence of a stretch, and where in it the stretch begins."""
        words: Words = np.array([[lane], [number]], dtype=np.uint64)
        word = _mixed(_mixed(self._key + words[0]) + words[1])
        place = int(word[0] % np.uint64(self._ends[-1]))
        sequence = int(np.searchsorted(self._ends, place, side="right"))
        return sequence, place - (int(self._ends[sequence - 1]) if sequence else 0)


def shuffled(count: int, seed: int, epoch: int) -> Integers:
    """A permutation of `range(count)`: the same for the same seed and epoch, always.

    The numbers are sorted by a hash of their own (the finalizer of SplitMix64), so that the
    order does not hang on any library's random generator.

    References:
        Steele, Lea & Flood (2014), doi:10.1145/2714064.2660195.
    """
    numbers: Words = np.arange(count, dtype=np.uint64)
    return np.argsort(_mixed(_key(seed, epoch) + numbers), kind="stable").astype(np.int64)


def _key(seed: int, epoch: int) -> Words:
    # Modulo 2**64, as arrays compute.
    words: Words = np.array([[seed % 2**64], [epoch % 2**64]], dtype=np.uint64)
    return _mixed(_mixed(words[0]) + words[1])


def _mixed(words: Words) -> Words:
    mixed = words + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
