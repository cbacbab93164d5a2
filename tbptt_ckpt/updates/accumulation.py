"""The windows of one update, where there are several."""

from __future__ import annotations

from typing import Any, SupportsFloat

from torch import Tensor

from tbptt_ckpt.module.host import Number


class Accumulation:
    """Counts the windows of a group, and averages their gradients.

    With reduction "mean" an update takes the mean of its windows' gradients, as users of
    PyTorch do who divide each loss by the number of backward passes; with "sum" it takes
    their sum. Windows without a loss do not count. The last group of a sequence may be
    short, and is then the mean of the windows that it has.
    """

    def __init__(self, num_windows: int, averages: bool) -> None:
        self.num_windows, self._averages = num_windows, averages
        self.pending = 0
        self._loss_sum: Tensor | None = None
        self._last: SupportsFloat = 0.0  # window's, which no device has to be asked for

    def begin(self) -> None:
        """A new group, of no window yet."""
        self.pending, self._loss_sum = 0, None

    def add(self, loss: Tensor, number: Number) -> None:
        """A window has added its gradients; `number` is its loss for the host."""
        self.pending, self._last = self.pending + 1, number
        self._loss_sum = loss if self._loss_sum is None else self._loss_sum + loss

    def is_due(self, is_last: bool) -> bool:
        """Whether an update comes now: the group is full, or the sequence ends with it."""
        return self.pending == self.num_windows or (is_last and self.pending > 0)

    def average(self, grad: Tensor) -> None:
        """Divide a gradient of the group by the number of its windows."""
        if self._averages and self.pending > 1:
            grad.div_(self.pending)

    def end(self) -> SupportsFloat:
        """The mean loss of the windows in the group, after which another one begins."""
        assert self._loss_sum is not None, "a group that is due has a window"
        loss = self._last if self.pending == 1 else self._loss_sum / self.pending
        self.begin()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Where the group stands; the gradients themselves are in `.grad`."""
        return {"pending": self.pending, "loss_sum": self._loss_sum}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was called."""
        self.pending, self._loss_sum = state["pending"], state["loss_sum"]
        self._last = 0.0 if self._loss_sum is None else self._loss_sum
