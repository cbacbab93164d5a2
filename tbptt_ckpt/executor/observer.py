"""Who watches a window while it is run: to time its actions, or to read memory in between."""

from __future__ import annotations

from typing import Protocol

from tbptt_ckpt.schedule import Action


class Observer(Protocol):
    """Told what a window is doing as it does it; it must change nothing."""

    def begins(self, action: Action) -> None:
        """An action is about to be run; the one before it is done."""

    def differentiates(self) -> None:
        """A leaf has been run with its graph; its gradient comes next."""

    def ends(self) -> None:
        """All actions are done."""


class _Unobserved:
    """Watches nothing."""

    def begins(self, action: Action) -> None:
        """Nothing to do."""

    def differentiates(self) -> None:
        """Nothing to do."""

    def ends(self) -> None:
        """Nothing to do."""


UNOBSERVED: Observer = _Unobserved()
