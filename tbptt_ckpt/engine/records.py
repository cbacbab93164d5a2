"""What passes from window to window: states to start from, generators, buffers, and notes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from tbptt_ckpt.engine.options import Options
from tbptt_ckpt.executor.boundary import Boundary
from tbptt_ckpt.module.ambient import AmbientState
from tbptt_ckpt.module.host import Number, Numbers
from tbptt_ckpt.module.trees import Tree, detach_state, norms_of_change
from tbptt_ckpt.schedule.truncation import Draw
from tbptt_ckpt.schedule.windows import Window, later_starts, next_point, points_after, window_at


@dataclass(slots=True)
class Records:
    """States at steps where later windows begin or restart, dropped when none will."""

    boundaries: dict[int, Boundary] = field(default_factory=dict)
    # Generators and buffers as they were found when the step was new.
    ambients: dict[int, AmbientState] = field(default_factory=dict)
    carried: Boundary | None = None  # the state at the last update point
    origin: int = 0  # the step that no window reaches across, 0 unless a window was skipped
    # The state there, where it is no more the sequence's first state.
    origin_state: Tree = None
    has_origin_state: bool = False
    calls: set[tuple[int, int]] = field(default_factory=set)  # of segments; of this process

    def copy(self) -> Records:
        """Another holder of the same states."""
        return replace(
            self,
            boundaries=dict(self.boundaries),
            ambients=dict(self.ambients),
            calls=set(self.calls),
        )

    def restart_at(self, step: int, ambient: AmbientState) -> None:
        """Go on at `step` from the state carried so far, as if no step lay in between."""
        self.boundaries, self.ambients, self.calls, self.origin = {}, {}, set(), step
        if self.carried is not None:
            self.origin_state, self.has_origin_state = self.carried.state, True
            self.carried = Boundary(step, self.carried.state, ambient)
            self.boundaries[step] = self.carried

    def find_ambient(self, step: int, ambient: AmbientState) -> None:
        """A window's new steps begin at `step`: what they find there is what counts."""
        self.ambients[step] = ambient

    def note_ambient(self, step: int, ambient: AmbientState) -> None:
        """A first run passed `step`."""
        self.ambients.setdefault(step, ambient)

    def take(
        self, noted: Iterable[Boundary], final: Boundary, next_start: int, *, keeps: bool
    ) -> None:
        """A window has run; `keeps`: older states stay, since their steps did not run again."""
        kept = self.boundaries if keeps else {}
        kept = {**kept, **{boundary.step: boundary for boundary in (*noted, final)}}
        self.boundaries = {s: b for s, b in kept.items() if s >= next_start}
        self.ambients = {s: a for s, a in self.ambients.items() if s >= next_start}
        self.calls = {call for call in self.calls if call[1] > next_start}
        self.carried = final

    def last_at_or_before(self, step: int) -> Boundary | None:
        """The kept state nearest before `step`, or at it."""
        steps = [s for s in self.boundaries if s <= step]
        return self.boundaries[max(steps)] if steps else None

    def has(self, step: int) -> bool:
        """Whether a window can start there."""
        return step in self.boundaries or (step == self.origin and step in self.ambients)

    def placed(self, window: Window, *, must_be_recorded: bool) -> Window:
        """The window as it can begin: not before the origin, and, if it must, at a kept state.

        Under stale overlap a last window of unforeseen length starts at a recorded state.
        """
        start = max(window.start, self.origin)
        foreseen = start == self.origin or start >= window.new_start
        if must_be_recorded and not foreseen:
            start = min(step for step in self.boundaries if step >= start)
        return window if start == window.start else replace(window, start=start)

    def ambients_for(self, first: int, k1: int) -> dict[int, AmbientState]:
        """What a run that begins at `first` restores, there and at update points, in order."""
        return {s: self.ambients[s] for s in sorted(self.ambients) if s == first or s % k1 == 0}


class Drift:
    """How far recorded states have drifted: the most of them, relative, all tensors together."""

    def __init__(self, numbers: Numbers) -> None:
        self._numbers = numbers
        self._norms: list[list[tuple[Number, Number]]] = []

    def add(self, state: Tree, recorded: Tree) -> None:
        """A recorded state was reached again."""
        ask = self._numbers.ask
        norms = norms_of_change(state, recorded)
        self._norms.append([(ask(change), ask(size)) for change, size in norms])

    @property
    def value(self) -> float:
        """The largest relative change; 0.0 where nothing was reached again."""
        return max([0.0, *map(_relative, self._norms)])


def _relative(norms: Sequence[tuple[Number, Number]]) -> float:
    change, size = (sum(float(pair[side]) ** 2 for pair in norms) for side in (0, 1))
    if change == 0.0:
        return 0.0
    return (change / size) ** 0.5 if size else float("inf")


class Notes:
    """What one window notes in passing: states that later windows start from, and their drift."""

    def __init__(
        self,
        options: Options,
        draw: Draw,
        num_steps: int | None,
        records: Records,
        numbers: Numbers,
    ) -> None:
        window = draw.whole
        self._options, self._window, self._records = options, window, records
        k1, k2 = options.k1, options.most_k2
        upcoming = window_at(window.index + 1, num_steps, k1, k2)
        # Where the next window starts, or this one's end if that is earlier.
        self.next_start = max(min(upcoming.start, window.stop), records.origin)
        self._later_starts: Sequence[int] = later_starts(window, num_steps, k1, k2)
        if options.is_auto:  # a later window may start at any update point, the next one here
            self.next_start = next_point(self.next_start, k1)
            self._later_starts = draw.later
        self._keeps_later_starts = options.is_stale or options.is_auto
        # Generators and buffers as the first run of the steps so far left them.
        self.left = records.ambients[window.new_start]
        self._replaces_old = False
        self._noted: dict[int, Boundary] = {}
        self._final: Boundary | None = None
        self.drift = Drift(numbers)

    @property
    def final(self) -> Boundary:
        """The state at the window's end."""
        assert self._final is not None, "the window has run"
        return self._final

    def states(self) -> list[Tree]:
        """The states that later windows start from."""
        return [boundary.state for boundary in (*self._noted.values(), self.final)]

    def noted(self, step: int) -> Boundary:
        """The state there, if it was noted, or else as it was recorded."""
        return self._noted.get(step) or self._records.boundaries[step]

    def keep_all(self, *, ran_again: bool) -> None:
        """Note where all later windows start: the next one may not pass these states again.

        Where the whole window `ran_again`, what was recorded in it before is of older weights.
        """
        self._keeps_later_starts = True
        if self._options.is_auto:
            window = self._window
            self._later_starts = points_after(window.first, window.stop, self._options.k1)
        self._replaces_old = ran_again and not self._options.is_auto

    def stops(self, noted: Sequence[int] = ()) -> list[int]:
        """Steps at which runs must end for their states to be noted, once some have been."""
        earliest = 0 if self._keeps_later_starts else self._window.new_start
        found = [step for step in self._later_starts if step > earliest]
        if self._options.is_auto:
            return [step for step in found if step not in noted and step not in self._noted]
        return [self.next_start, *found]

    def has_next_start(self) -> bool:
        """Whether the next window has a state to start from."""
        records = self._records
        recorded = (records.origin, self._window.stop, *records.boundaries, *self._noted)
        return self._options.is_stale or self.next_start in recorded

    def forget(self) -> None:
        """The window is undone: generators and buffers are as before it."""
        self.left = self._records.ambients[self._window.new_start]

    def arrives(self, step: int, state: Tree, ambient: AmbientState) -> None:
        """Note a state that later windows start from, and how far an old one has drifted."""
        window, records, options = self._window, self._records, self._options
        is_old = step <= window.new_start
        is_later = self._keeps_later_starts and step in self._later_starts
        # Stale blocks restart at all update points; a later start of a silent window may be new.
        is_recorded = step % options.k1 == 0 if options.is_stale else options.is_auto and is_later
        if step in self._noted:
            return
        if step == window.new_start or (is_old and is_recorded):
            self.drift.add(state, records.boundaries[step].state)
        if not is_old:
            records.note_ambient(step, ambient)
        if is_old and options.is_stale:
            return
        boundary = Boundary(step, detach_state(state), ambient)
        if step == window.stop:
            self._final, self.left = boundary, ambient
        elif is_later or (step == self.next_start and not options.is_auto):
            self._noted[step] = boundary

    def hand_on(self) -> None:
        """Leave to the next windows what they start from."""
        noted, keeps = self._noted.values(), self._keeps_later_starts and not self._replaces_old
        self._records.take(noted, self.final, self.next_start, keeps=keeps)
