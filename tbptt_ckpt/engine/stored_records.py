"""What passes from window to window as plain data, and back once it is known to fit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from tbptt_ckpt.engine.records import Records
from tbptt_ckpt.errors import SnapshotError
from tbptt_ckpt.executor.boundary import Boundary
from tbptt_ckpt.module.ambient import Ambient, AmbientState
from tbptt_ckpt.module.buffers import BufferValue
from tbptt_ckpt.module.generators import GeneratorState
from tbptt_ckpt.module.trees import Tree, structure, tensors_of


def store_records(records: Records, present: AmbientState) -> dict[str, Any]:
    """Records and the present generators and buffers as containers of numbers and tensors."""
    boundaries = _Table(records.boundaries.values())
    carried = None if records.carried is None else boundaries.index(records.carried)
    found = [boundary.ambient for boundary in boundaries.items]
    ambients = _Table([*records.ambients.values(), *found, present])
    random = _Table(r for a in ambients.items for r in (a.cpu_random, *a.device_random))
    values = _Table(value for a in ambients.items for value in a.buffers)
    generators = _Table(state for a in ambients.items for state in a.generators)
    return {
        "random": random.items,
        "values": [value.values for value in values.items],
        "generators": [state.values for state in generators.items],
        "ambients": [
            {
                "cpu": random.index(a.cpu_random),
                "devices": [random.index(r) for r in a.device_random],
                "buffers": [values.index(value) for value in a.buffers],
                "generators": [generators.index(state) for state in a.generators],
                "drawn": list(a.drawn),
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
    generators = [GeneratorState(None, found) for found in stored.get("generators", [])]
    ambients = [
        AmbientState(
            random[a["cpu"]],
            tuple(random[index] for index in a["devices"]),
            tuple(values[index] for index in a["buffers"]),
            tuple(generators[index] for index in a.get("generators", [])),
            tuple(a.get("drawn", [])),
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


def check_records(records: Records, present: AmbientState, ambient: Ambient) -> None:
    """Raise unless a run with this `ambient` can go on from records of another process.

    States are held against one another: all are what the module returned. Sizes may have changed
    with time.

    Raises:
        ArgumentError: They are of a module with other buffers or generators.
        SnapshotError: They are of no run.
    """
    kept = sorted(records.boundaries.items())
    carried = [] if records.carried is None else [(records.carried.step, records.carried)]
    for step, boundary in (*kept, *carried):
        if step != boundary.step:
            raise SnapshotError(f"the state kept at step {step} says step {boundary.step}")
    for (step, boundary), (other, last) in zip(kept, (kept + carried)[1:], strict=False):
        here, there = _looks(boundary.state), _looks(last.state)
        if here != there:
            raise SnapshotError(
                f"the states kept at steps {step} and {other} are of different structure, "
                f"dimensions or dtypes: {here} and {there}"
            )
    found = [boundary.ambient for _, boundary in (*kept, *carried)]
    ambient.check_fits([*records.ambients.values(), *found, present])


def _looks(state: Tree) -> object:
    """What no two states of a run differ in; those of mixed precision may, in their dtypes."""
    mixed = (torch.float16, torch.bfloat16, torch.float32)
    return structure(state), [
        (tensor.dim(), "mixed" if tensor.dtype in mixed else tensor.dtype)
        for tensor in tensors_of(state)
    ]


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
