"""Arrays as parallel lanes of equal length, and the part of them that is held out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tbptt_ckpt.arguments import PositiveInt, checked
from tbptt_ckpt.data.source import check_mapped, check_range, check_same_source
from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.module.host import sent

Array = NDArray[Any]

HELD_OUT_PART = 20  # the last twentieth, 5 %
_IN_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


class EqualLanes:
    """An array, time first, as parallel lanes; a source for `TBPTT`.

    Lane b reads the b-th of `lanes` equal, contiguous stretches. Without targets each step's
    target is the step after it. Equal lanes need no padding, weights or resets, and are read in
    one piece, which makes a read cheaper than that of a `LaneSource`. A read touches the steps it
    returns and no others, so a memory-mapped file stays on disk.

    Whole numbers are read as int64, others in `dtype`; a step of one of these has one feature.

    Args:
        inputs: [T, ...], or with `lanes=None` [T, B, ...].
        lanes: Stretches to cut it into; None: there are lanes in it.
        targets: The same.
        dtype: Of numbers that are not whole.
        device: Where `read` puts its tensors.
        max_steps: Offer only the first steps of each stretch.
    """

    time_dim = 0

    @checked
    def __init__(
        self,
        inputs: Array,
        lanes: PositiveInt | None,
        targets: Array | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        max_steps: PositiveInt | None = None,
    ) -> None:
        self._inputs, self._targets, self._cut = inputs, targets, lanes is not None
        self.lanes = inputs.shape[1] if lanes is None else lanes
        self._dtype, self._device = dtype, torch.device(device)
        ahead, stretches = int(targets is None), lanes or 1
        self._lane_steps = (len(inputs) - ahead) // stretches
        if self._lane_steps < 1:
            raise ArgumentError(
                f"{len(inputs)} steps are too short for lanes={lanes}, which need "
                f"{stretches + ahead}"
            )
        self._num_steps = min(self._lane_steps, max_steps or self._lane_steps)

    def __len__(self) -> int:
        return self._num_steps

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the steps `[start, stop)`, each [stop - start, lanes, ...]."""
        return self.read_lanes(start, stop, slice(0, self.lanes))

    def read_lanes(self, start: int, stop: int, lanes: slice) -> tuple[Tensor, Tensor]:
        """The same of some lanes only, which is all that is read."""
        check_range(start, stop, self._num_steps)
        if self._targets is None:
            steps = self._rows(self._inputs, start, stop + 1, lanes)
            return steps[:-1], steps[1:]
        arrays = self._inputs, self._targets
        inputs, targets = (self._rows(array, start, stop, lanes) for array in arrays)
        return inputs, targets

    def state_dict(self) -> dict[str, Any]:
        """What identifies the lanes; a read depends on its arguments alone."""
        return {"length": len(self._inputs), "lanes": self.lanes, "num_steps": self._num_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Accept what `state_dict` of equal lanes returned."""
        check_same_source(state, self.state_dict())

    def _rows(self, array: Array, start: int, stop: int, lanes: slice) -> Tensor:
        check_mapped(array)
        if self._cut:
            offsets = (lane * self._lane_steps for lane in range(lanes.start, lanes.stop))
            rows = np.stack([array[o + start : o + stop] for o in offsets], axis=1)
        else:
            rows = array[start:stop, lanes]
        whole = array.dtype.kind in "biu"
        rows = np.array(rows, np.int64 if whole else _IN_NUMPY[self._dtype], order="C")
        rows = rows[..., None] if not whole and rows.ndim == 2 else rows
        return sent(torch.from_numpy(rows), self._device)


def parts(array: Array) -> tuple[Array, Array]:
    """What is trained on, and the last of it, to be judged by."""
    cut = len(array) - len(array) // HELD_OUT_PART
    return array[:cut], array[cut:]
