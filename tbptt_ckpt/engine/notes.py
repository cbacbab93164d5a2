"""What a window notes in passing: states that later windows start from, and their drift."""

from __future__ import annotations

from tbptt_ckpt.engine.options import Options
from tbptt_ckpt.engine.records import Records
from tbptt_ckpt.executor.boundary import Boundary
from tbptt_ckpt.executor.observer import Observer
from tbptt_ckpt.module.ambient import AmbientState
from tbptt_ckpt.module.trees import Tree, detach_state, relative_change
from tbptt_ckpt.schedule.windows import Window, later_starts, window_at


class Notes(Observer):
    """The notes of one window.

    Attributes:
        next_start: Where the next window starts, or this one's end if that is earlier.
        left: Generators and buffers as the first run of the steps so far left them.
        drift: See `WindowResult`.
    """

    def __init__(
        self, options: Options, window: Window, num_steps: int | None, records: Records
    ) -> None:
        self._options, self._window, self._records = options, window, records
        upcoming = window_at(window.index + 1, num_steps, options.k1, options.k2)
        self.next_start = max(min(upcoming.start, window.stop), records.origin)
        self._later_starts = later_starts(window, num_steps, options.k1, options.k2)
        self._keeps_later_starts = options.is_stale
        self.left = records.ambients[window.new_start]
        self._noted: dict[int, Boundary] = {}
        self._final: Boundary | None = None
        self.drift = 0.0

    @property
    def final(self) -> Boundary:
        """The state at the window's end."""
        assert self._final is not None, "the window has run"
        return self._final

    def states(self) -> list[Tree]:
        """The states that later windows start from."""
        return [boundary.state for boundary in (*self._noted.values(), self.final)]

    def keep_all(self) -> None:
        """Note where all later windows start: the next one may not pass these states again."""
        self._keeps_later_starts = True

    def stops(self) -> list[int]:
        """Steps at which runs must end, for their states to be noted."""
        earliest = 0 if self._keeps_later_starts else self._window.new_start
        return [self.next_start, *(step for step in self._later_starts if step > earliest)]

    def num_coming_states(self) -> int:
        """States that the window leaves behind, and the gradient of one."""
        window, is_stale = self._window, self._options.is_stale
        noted = {self.next_start, *(self._later_starts if is_stale else ())}
        earliest = window.new_start if is_stale else window.first
        return 2 + len([step for step in noted if earliest < step < window.stop])

    def has_next_start(self) -> bool:
        """Whether the next window has a state to start from."""
        records = self._records
        recorded = (records.origin, self._window.stop, *records.boundaries, *self._noted)
        return self._options.is_stale or self.next_start in recorded

    def arrives(self, step: int, state: Tree, ambient: AmbientState) -> None:
        """Note a state that later windows start from, and how far an old one has drifted."""
        window, records, is_stale = self._window, self._records, self._options.is_stale
        is_old = step <= window.new_start
        is_block = is_stale and step % self._options.k1 == 0
        if step == window.new_start or (is_old and is_block):
            recorded = records.boundaries[step].state
            self.drift = max(self.drift, relative_change(state, recorded))
        if not is_old:
            records.note_ambient(step, ambient)
        if is_old and is_stale:
            return
        boundary = Boundary(step, detach_state(state), ambient)
        if step == window.stop:
            self._final, self.left = boundary, ambient
        elif step == self.next_start or (self._keeps_later_starts and step in self._later_starts):
            self._noted[step] = boundary

    def hand_on(self) -> None:
        """Leave to the next windows what they start from."""
        noted, keeps = self._noted.values(), self._keeps_later_starts
        self._records.take(noted, self.final, self.next_start, keeps=keeps)
