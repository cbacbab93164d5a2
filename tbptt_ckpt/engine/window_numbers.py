"""What the host is to know of one window, asked for once all of it has run, and read together."""

from __future__ import annotations

from torch import Tensor

from tbptt_ckpt.engine.initial_state import InitialState
from tbptt_ckpt.executor.observer import Observer
from tbptt_ckpt.executor.window_loss import WindowLoss
from tbptt_ckpt.module.host import Number, Numbers
from tbptt_ckpt.module.trees import Tree
from tbptt_ckpt.updates.updater import Updater


class WindowNumbers(Numbers):
    """The numbers of a window whose update `updater` makes, unless one of them speaks against it.

    Attributes:
        loss: What was differentiated, detached; None where nothing was.
        loss_number: The same for the host, where something was.
    """

    def __init__(self, updater: Updater, initial: InitialState, observer: Observer) -> None:
        super().__init__()
        self._updater, self._initial, self._observer = updater, initial, observer
        self._is_complete = False
        self.loss: Tensor | None = None
        self.loss_number = Number(None)

    def complete(self, loss: WindowLoss, states: list[Tree]) -> None:
        """All has run, and later windows start from `states`: ask for the rest, once."""
        if self._is_complete:
            return
        self._is_complete = True
        loss.ask(self)
        self.loss = loss.value
        self._observer.asks(self, self.loss, states)
        if self.loss is not None:
            self.loss_number = self.ask(self.loss)
            self._updater.ask_norm(self, self._initial.leaves(), self._observer)

    def drop_loss(self) -> None:
        """It turned out that nothing counted."""
        self.loss = None
