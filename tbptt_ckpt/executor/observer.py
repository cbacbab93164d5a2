"""Who is told what a run does, as it does it: one observer, given at construction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from tbptt_ckpt.module.ambient import AmbientState
from tbptt_ckpt.module.host import Numbers
from tbptt_ckpt.module.trees import Tree
from tbptt_ckpt.schedule.actions import Action
from tbptt_ckpt.schedule.windows import Window
from tbptt_ckpt.updates.updater import UpdateWatch


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

    def reaches(self, step: int, state_grads: Sequence[Tensor | None]) -> None:
        """A leaf is differentiated, and the gradient has come back to `step`, where it begins.

        Not told where a window is one graph, as under `executor="checkpoint"`.

        Args:
            step: Where the gradient has come to.
            state_grads: One for each tensor of the state; None where none is asked for.
        """

    def arrives(self, step: int, state: Tree, ambient: AmbientState) -> None:
        """A run ended for the first time at a step where states are noted, or at the window's end.

        The state may carry a graph; generators and buffers are those of that step.
        """

    def ends(self) -> None:
        """All actions of a window are done."""

    def asks(self, numbers: Numbers, loss: Tensor | None, states: list[Tree]) -> None:
        """The same as of `differentiated` is to be said: ask for numbers to look at then.

        All are read at once, since reading waits for a device.
        """

    def differentiated(self, window: Window, loss: Tensor | None, states: list[Tree]) -> None:
        """A window's gradient is complete, and its update comes next.

        Args:
            window: Which.
            loss: Its loss, detached; None where it has none.
            states: What later windows start from.
        """


UNOBSERVED = Observer()


_TOLD = (*(name for name in vars(Observer) if not name.startswith("_")), "takes_norm")
_WANTED = ("wants_norm", "wants_undo", "wants_copies")


def together(*observers: Observer) -> Observer:
    """One observer that tells all of them, in order."""
    told = [observer for observer in observers if observer is not UNOBSERVED]
    return told[0] if len(told) == 1 else _Several(told) if told else UNOBSERVED


class _Several(Observer):
    def __init__(self, observers: Sequence[Observer]) -> None:
        for name in _WANTED:
            setattr(self, name, any(getattr(observer, name) for observer in observers))
        for name in _TOLD:
            setattr(self, name, _tell([getattr(observer, name) for observer in observers]))


def _tell(methods: Sequence[Callable[..., None]]) -> Callable[..., None]:
    def tell(*what: Any) -> None:
        for method in methods:
            method(*what)

    return tell


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
