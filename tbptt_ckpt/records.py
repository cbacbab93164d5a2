"""What passes from window to window: states to start from, generators, buffers."""

from __future__ import annotations

from tbptt_ckpt.ambient import AmbientState
from tbptt_ckpt.state import Tree
from tbptt_ckpt.task import Boundary


class Records:
    """States at steps where later windows begin or restart, dropped when none will.

    Attributes:
        boundaries: States by step.
        ambients: Generators and buffers by step, as found when the step was new.
        carried: The state at the last update point.
        origin: The step that no window reaches across, 0 unless a window was skipped.
        origin_state: The state there; None where it is the sequence's first state, or has
            not been replaced by another.
        has_origin_state: Whether `origin_state` counts.
    """

    def __init__(self) -> None:
        self.boundaries: dict[int, Boundary] = {}
        self.ambients: dict[int, AmbientState] = {}
        self.carried: Boundary | None = None
        self.origin = 0
        self.origin_state: Tree = None
        self.has_origin_state = False

    def copy(self) -> Records:
        """Another holder of the same states."""
        other = Records()
        other.boundaries, other.ambients = dict(self.boundaries), dict(self.ambients)
        other.carried, other.origin = self.carried, self.origin
        other.origin_state, other.has_origin_state = self.origin_state, self.has_origin_state
        return other

    def restart_at(self, step: int, ambient: AmbientState) -> None:
        """Go on at `step` from the state carried so far, as if no step lay in between."""
        self.boundaries, self.ambients, self.origin = {}, {}, step
        if self.carried is not None:
            self.origin_state, self.has_origin_state = self.carried.state, True
            self.carried = Boundary(step, self.carried.state, ambient)
            self.keep(self.carried)

    def keep(self, boundary: Boundary) -> None:
        """Keep a state."""
        self.boundaries[boundary.step] = boundary

    def last_at_or_before(self, step: int) -> Boundary | None:
        """The kept state nearest before `step`, or at it."""
        steps = [s for s in self.boundaries if s <= step]
        return self.boundaries[max(steps)] if steps else None

    def first_at_or_after(self, step: int) -> int:
        """The first step with a kept state."""
        return min(s for s in self.boundaries if s >= step)

    def drop_before(self, step: int) -> None:
        """Forget what lies before `step`."""
        self.boundaries = {s: b for s, b in self.boundaries.items() if s >= step}
        self.ambients = {s: a for s, a in self.ambients.items() if s >= step}

    def ambients_for(self, first: int, k1: int) -> dict[int, AmbientState]:
        """What a run that begins at `first` restores, there and at update points, in order."""
        return {s: self.ambients[s] for s in sorted(self.ambients) if s == first or s % k1 == 0}


def changes(ambients: dict[int, AmbientState]) -> list[int]:
    """Steps whose generators or buffers are not those of the step before them in order."""
    last, changed = None, []
    for step, ambient in ambients.items():
        if ambient is not last:
            changed.append(step)
        last = ambient
    return changed
