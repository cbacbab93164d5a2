"""Who watches updates of the weights, and how carefully they are made for it."""

from __future__ import annotations

from torch import Tensor


class UpdateWatch:
    """Watches nothing and wants nothing; what others override.

    Attributes:
        wants_norm: Whether the norm of the gradients is measured where nothing is clipped.
        wants_undo: Whether an update that is cut short may be taken back, as long as it has
            changed nothing.
        wants_copies: Whether a copy is taken during each of those, so that it can be taken back
            in any case.
    """

    wants_norm = wants_undo = wants_copies = False

    def takes_norm(self, norm: Tensor) -> None:
        """The norm of an update's gradients, before they are clipped."""


UNWATCHED = UpdateWatch()
