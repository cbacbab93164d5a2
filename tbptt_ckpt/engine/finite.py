"""Ends a run at its first loss that is not finite."""

from __future__ import annotations

import math

from torch import Tensor

from tbptt_ckpt.errors import NonFiniteError
from tbptt_ckpt.executor.observer import Observer
from tbptt_ckpt.module.trees import Tree
from tbptt_ckpt.schedule.windows import Window


class FiniteLoss(Observer):
    """Raises before the update that such a loss would make."""

    def differentiated(self, window: Window, loss: Tensor | None, states: list[Tree]) -> None:
        """Look at the loss."""
        if loss is not None and not math.isfinite(loss):
            raise NonFiniteError(
                f"window {window.index}, steps {window.new_start} to {window.stop}: the loss is "
                f"{float(loss)}, and the weights were not updated; check_finite=False makes such "
                "updates, Trainer(non_finite=NonFinite(policy='skip')) leaves such windows out"
            )
