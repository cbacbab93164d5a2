"""Who is told what a run does, as it does it: one observer, given at construction."""

from __future__ import annotations

from torch import Tensor

from tbptt_ckpt.module.ambient import AmbientState
from tbptt_ckpt.module.trees import Tree
from tbptt_ckpt.schedule.actions import Action
from tbptt_ckpt.schedule.windows import Window
from tbptt_ckpt.updates.watch import UpdateWatch


class Observer(UpdateWatch):
    """Told what a run does; it must change nothing.

    Every method does nothing: override those that matter. An error that one raises ends the
    window before its update.
    """

    def planned(self, window: Window) -> None:
        """A window is planned, and nothing of it has run."""

    def begins(self, action: Action) -> None:
        """An action is about to be run; the one before it is done."""

    def differentiates(self) -> None:
        """A leaf has been run with its graph; its gradient comes next."""

    def arrives(self, step: int, state: Tree, ambient: AmbientState) -> None:
        """A run ended for the first time at a step where states are noted, or at the window's end.

        Args:
            step: Where.
            state: The state there, perhaps with a graph.
            ambient: Generators and buffers there.
        """

    def ends(self) -> None:
        """All actions of a window are done."""

    def differentiated(self, window: Window, loss: Tensor | None, states: list[Tree]) -> None:
        """A window's gradient is complete, and its update comes next.

        Args:
            window: Which.
            loss: Its loss, detached; None where it has none.
            states: What later windows start from.
        """


UNOBSERVED = Observer()


class _Several(Observer):
    """Several observers, told in order."""

    def __init__(self, observers: tuple[Observer, ...]) -> None:
        self._observers = observers
        self.wants_norm = any(observer.wants_norm for observer in observers)
        self.wants_undo = any(observer.wants_undo for observer in observers)
        self.wants_copies = any(observer.wants_copies for observer in observers)

    def planned(self, window: Window) -> None:
        for observer in self._observers:
            observer.planned(window)

    def begins(self, action: Action) -> None:
        for observer in self._observers:
            observer.begins(action)

    def differentiates(self) -> None:
        for observer in self._observers:
            observer.differentiates()

    def arrives(self, step: int, state: Tree, ambient: AmbientState) -> None:
        for observer in self._observers:
            observer.arrives(step, state, ambient)

    def ends(self) -> None:
        for observer in self._observers:
            observer.ends()

    def differentiated(self, window: Window, loss: Tensor | None, states: list[Tree]) -> None:
        for observer in self._observers:
            observer.differentiated(window, loss, states)

    def takes_norm(self, norm: Tensor) -> None:
        for observer in self._observers:
            observer.takes_norm(norm)


def together(*observers: Observer) -> Observer:
    """One observer that tells all of them."""
    told = tuple(observer for observer in observers if observer is not UNOBSERVED)
    return told[0] if len(told) == 1 else _Several(told) if told else UNOBSERVED


class ActionTrace(Observer):
    """Writes down the actions that are run.

    Attributes:
        actions: In order, of all windows since it was last cleared.
    """

    def __init__(self) -> None:
        self.actions: list[Action] = []

    def begins(self, action: Action) -> None:
        """Write it down."""
        self.actions.append(action)
