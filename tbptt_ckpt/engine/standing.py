"""Where a run stands between two windows: to go on from, to rewind to, to save."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from tbptt_ckpt.engine.records import Records, load_records, store_records
from tbptt_ckpt.engine.results import Totals
from tbptt_ckpt.executor.window_pass import StateGrads
from tbptt_ckpt.module.ambient import AmbientState
from tbptt_ckpt.schedule.windows import Window


@dataclass(frozen=True, slots=True, eq=False)
class Standing:
    """Where a run stands between two windows."""

    index: int = 0  # of the next window
    records: Records = field(default_factory=Records)  # what earlier windows left
    totals: Totals = field(default_factory=Totals)  # sums over them
    weights_before: object = None  # fingerprint of the weights that the last one ran with
    state_grads: StateGrads | None = None  # gradients of the last one's first state

    def copy(self) -> Standing:
        """The same; windows that follow do not change it."""
        return replace(self, records=self.records.copy())

    def skipping(self, window: Window, ambient: AmbientState) -> Standing:
        """Behind a window that was left out, from the state before it."""
        self.records.restart_at(window.stop, ambient)
        return replace(self, index=window.index + 1, totals=self.totals.skipping(window))

    def state_dict(self, present: AmbientState | None, weights: object) -> dict[str, Any]:
        """Containers of numbers and tensors.

        `present` are generators and buffers now, None before the first window.
        """
        before = self.weights_before
        changed = before is not None and before != weights
        return {
            "index": self.index,
            "records": None if present is None else store_records(self.records, present),
            "totals": asdict(self.totals),
            "weights": "unknown" if before is None else "changed" if changed else "unchanged",
        }


def load_standing(
    state: Mapping[str, Any], weights: object
) -> tuple[Standing, AmbientState | None]:
    """What `Standing.state_dict` gave, and the generators and buffers there."""
    records, present = Records(), None
    if state["records"] is not None:
        records, present = load_records(state["records"])
    known = {"unknown": None, "changed": "changed", "unchanged": weights}
    before = known[state["weights"]]
    return Standing(state["index"], records, Totals(**state["totals"]), before), present


@dataclass(frozen=True, slots=True, eq=False)
class Mark:
    """A place between two windows to which a run can be rewound."""

    standing: Standing
    ambient: AmbientState | None
    random: Tensor | None
    rewind_updater: Callable[[], None]
    collected: dict[int, Tensor]
