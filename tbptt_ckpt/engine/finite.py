"""Ends a run at its first loss that is not finite."""

from __future__ import annotations

import math

from torch import Tensor

from tbptt_ckpt.errors import NonFiniteError
from tbptt_ckpt.executor.observer import Observer
from tbptt_ckpt.module.host import Number, Numbers
from tbptt_ckpt.module.trees import Tree
from tbptt_ckpt.schedule.windows import Window


class FiniteLoss(Observer):
    """Raises before the update that such a loss would make."""

    def __init__(self) -> None:
        self._loss = Number(0.0)

    def asks(self, numbers: Numbers, loss: Tensor | None, states: list[Tree]) -> None:
        """Ask for the loss."""
        self._loss = Number(0.0) if loss is None else numbers.ask(loss)

    def differentiated(self, window: Window, loss: Tensor | None, states: list[Tree]) -> None:
        """Look at the loss."""
        if loss is not None and not math.isfinite(self._loss):
            raise NonFiniteError(
                f"window {window.index}, steps {window.new_start} to {window.stop}: the loss is "
                f"{float(self._loss)}, and the weights were not updated; check_finite=False makes "
                "such updates, Trainer(non_finite=NonFinite(policy='skip')) leaves such windows out"
            )
