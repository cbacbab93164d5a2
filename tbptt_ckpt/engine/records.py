"""What passes from window to window: states to start from, generators, buffers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from tbptt_ckpt.executor.boundary import Boundary
from tbptt_ckpt.module.ambient import AmbientState
from tbptt_ckpt.module.buffers import BufferValue
from tbptt_ckpt.module.trees import Tree
from tbptt_ckpt.schedule.windows import Window


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

    def copy(self) -> Records:
        """Another holder of the same states."""
        return replace(self, boundaries=dict(self.boundaries), ambients=dict(self.ambients))

    def restart_at(self, step: int, ambient: AmbientState) -> None:
        """Go on at `step` from the state carried so far, as if no step lay in between."""
        self.boundaries, self.ambients, self.origin = {}, {}, step
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
        """A window has run.

        Args:
            noted: States inside it that later windows start from.
            final: The state at its end.
            next_start: Where the next window starts.
            keeps: Whether older states stay: their steps did not run again.
        """
        kept = self.boundaries if keeps else {}
        kept = {**kept, **{boundary.step: boundary for boundary in (*noted, final)}}
        self.boundaries = {s: b for s, b in kept.items() if s >= next_start}
        self.ambients = {s: a for s, a in self.ambients.items() if s >= next_start}
        self.carried = final

    def last_at_or_before(self, step: int) -> Boundary | None:
        """The kept state nearest before `step`, or at it."""
        steps = [s for s in self.boundaries if s <= step]
        return self.boundaries[max(steps)] if steps else None

    def placed(self, window: Window, *, must_be_recorded: bool) -> Window:
        """The window as it can begin: not before the origin, and, if it must, at a kept state.

        Under stale overlap a last window of unforeseen length starts at a recorded state.
        """
        start = max(window.start, self.origin)
        foreseen = start == self.origin or start >= window.new_start
        if must_be_recorded and not foreseen:
            start = min(step for step in self.boundaries if step >= start)
        return replace(window, start=start)

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


def store_records(records: Records, present: AmbientState) -> dict[str, Any]:
    """Records and the present generators and buffers as containers of numbers and tensors."""
    boundaries = _Table(records.boundaries.values())
    carried = None if records.carried is None else boundaries.index(records.carried)
    found = [boundary.ambient for boundary in boundaries.items]
    ambients = _Table([*records.ambients.values(), *found, present])
    random = _Table(r for a in ambients.items for r in (a.cpu_random, *a.device_random))
    values = _Table(value for a in ambients.items for value in a.buffers)
    return {
        "random": random.items,
        "values": [value.values for value in values.items],
        "ambients": [
            {
                "cpu": random.index(a.cpu_random),
                "devices": [random.index(r) for r in a.device_random],
                "buffers": [values.index(value) for value in a.buffers],
            }
            for a in ambients.items
        ],
        "boundaries": [
            {"step": b.step, "state": b.state, "ambient": ambients.index(b.ambient)}
            for b in boundaries.items
        ],
        "kept": {step: boundaries.index(b) for step, b in records.boundaries.items()},
        "recorded": {step: ambients.index(a) for step, a in records.ambients.items()},
        "carried": carried,
        "present": ambients.index(present),
        "origin": records.origin,
        "origin_state": records.origin_state,
        "has_origin_state": records.has_origin_state,
    }


def load_records(stored: dict[str, Any]) -> tuple[Records, AmbientState]:
    """What was given to `store_records`."""
    random = stored["random"]
    values = [BufferValue(tensor) for tensor in stored["values"]]
    ambients = [
        AmbientState(
            random[a["cpu"]],
            tuple(random[index] for index in a["devices"]),
            tuple(values[index] for index in a["buffers"]),
        )
        for a in stored["ambients"]
    ]
    boundaries = [
        Boundary(b["step"], b["state"], ambients[b["ambient"]]) for b in stored["boundaries"]
    ]
    records = Records(
        boundaries={step: boundaries[index] for step, index in stored["kept"].items()},
        ambients={step: ambients[index] for step, index in stored["recorded"].items()},
        carried=None if stored["carried"] is None else boundaries[stored["carried"]],
        origin=stored["origin"],
        origin_state=stored["origin_state"],
        has_origin_state=stored["has_origin_state"],
    )
    return records, ambients[stored["present"]]


class _Table:
    """Distinct objects in order."""

    def __init__(self, items: Iterable[Any]) -> None:
        self.items: list[Any] = []
        self._indices: dict[int, int] = {}
        for item in items:
            self.index(item)

    def index(self, item: Any) -> int:
        """Where the object is; it is added if it is new."""
        if id(item) not in self._indices:
            self._indices[id(item)] = len(self.items)
            self.items.append(item)
        return self._indices[id(item)]
