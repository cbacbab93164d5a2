"""Records as plain data, and back.

NOTE [Identity is part of a record]
Where nothing was drawn or changed between two steps they share one `AmbientState`, and runs
are not cut between them. What was one object is one object again after loading, so that a
resumed run is cut where the other was.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tbptt_ckpt.ambient import AmbientState
from tbptt_ckpt.buffers import BufferValue
from tbptt_ckpt.records import Records
from tbptt_ckpt.task import Boundary


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
        "values": [None if value.is_none else value.values for value in values.items],
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
    records = Records()
    records.boundaries = {step: boundaries[index] for step, index in stored["kept"].items()}
    records.ambients = {step: ambients[index] for step, index in stored["recorded"].items()}
    records.carried = None if stored["carried"] is None else boundaries[stored["carried"]]
    records.origin, records.origin_state = stored["origin"], stored["origin_state"]
    records.has_origin_state = stored["has_origin_state"]
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
