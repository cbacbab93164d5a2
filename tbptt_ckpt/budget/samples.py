"""What segments of some length took, and curves through what several took."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from tbptt_ckpt.schedule.curves import Curve, bounding_curve, higher


class Peaks(NamedTuple):
    """The peaks of a leaf, which lie on lines of their own: one may overtake the other."""

    forward: int  # while its graph is built
    backward: int  # while it is differentiated, beside what gradients take

    @property
    def most(self) -> int:
        """The higher one."""
        return max(self)


@dataclass(frozen=True, slots=True)
class SegmentBytes:
    """What segments of some length take."""

    steps: int  # their length
    last_leaf: Peaks  # of a leaf before gradients exist, above what then is live
    leaf: Peaks  # of a leaf afterwards, above what then is live
    advance: int  # peak of an advance
    gradients: int  # gradients of weights
    state_gradients: int  # gradients of a state
    graph: int  # tensors of a leaf's graph
    peak: int  # the highest of all, above what was live before

    @property
    def last_leaf_beside_gradients(self) -> Peaks:
        """Peaks of a leaf before gradients exist, without the gradients that it makes."""
        anew = self.gradients + self.state_gradients
        return Peaks(*(max(0, peak - anew) for peak in self.last_leaf))


@dataclass(frozen=True, slots=True)
class QuietSample:
    """What segments of some length take whose steps have no loss; the one after them has."""

    steps: int  # their length
    leaf: Peaks  # of a leaf, above what then is live
    graph: int  # tensors of its graph
    advance: int  # peak of an advance
    joined: JoinedBytes | None = None  # None where pieces of a leaf are not told apart


@dataclass(frozen=True, slots=True)
class JoinedBytes:
    """What a leaf of some length takes that is run in two pieces, as its last step has a loss."""

    last_leaf: int  # peak of its backward before gradients exist, without those that it makes
    leaf: int  # the same afterwards

    @classmethod
    def at_most(cls, sample: SegmentBytes) -> JoinedBytes:
        """No more than this, where it cannot be measured: gradients are held once more."""
        last, held = sample.last_leaf_beside_gradients.backward, sample.gradients
        return cls(last + held, sample.leaf.backward + held)


def peaks_curve(samples: Iterable[tuple[int, Peaks]]) -> Curve:
    """The peak of leaves of any length."""
    found = list(samples)
    forward = bounding_curve((steps, peaks.forward) for steps, peaks in found)
    backward = bounding_curve((steps, peaks.backward) for steps, peaks in found)
    return higher(forward, backward)
