"""Where a run stands between two windows: to go on from, to rewind to, to save."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from tbptt_ckpt.engine.options import Options
from tbptt_ckpt.engine.records import Records
from tbptt_ckpt.engine.results import Totals
from tbptt_ckpt.engine.stored_records import load_records, store_records
from tbptt_ckpt.executor.window_pass import StateGrads
from tbptt_ckpt.module.ambient import AmbientState
from tbptt_ckpt.schedule.windows import Window, joint_steps, window_at


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

    def unkept_window(
        self, num_steps: int | None, options: Options, at_records: bool
    ) -> Window | None:
        """The first window to come, of a sequence of so many steps, whose first state is not there.

        One that has updated off the grid, where the sequence does not end, is such a window too,
        and one with steps whose states it would need. With `at_records` windows begin where
        there is a state.
        """
        k1, k2, done, index = options.k1, options.most_k2, self.totals.num_steps, self.index
        records_all = options.is_stale or options.is_auto
        if done % k1 and num_steps != done:
            return window_at(index - 1, num_steps, k1, k2)
        while done and (num_steps is None or index * k1 < num_steps):
            window = window_at(index, num_steps, k1, k2)
            if index > self.index and (k2 is None or window.start >= done or not records_all):
                break  # its state is one that windows to come pass, or the first one's
            placed = self.records.placed(window, must_be_recorded=at_records)
            needed = {placed.first}
            if index == self.index:
                needed |= {placed.new_start, *(joint_steps(placed, k1) if records_all else ())}
                needed -= {self.records.origin} & {placed.new_start}  # it finds what it needs there
            if not all(map(self.records.has, needed)):
                return placed
            index += 1
        return None

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
    rewind_ambient: Callable[[], None]
    rewind_updater: Callable[[], None]
    collected: dict[int, Tensor]
