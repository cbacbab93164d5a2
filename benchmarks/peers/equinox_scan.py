"""Equinox's checkpointed scan: a binomial schedule over a given number of kept states."""

from __future__ import annotations

import equinox.internal
import jax

from benchmarks.peers.jax_peer import Carry, JaxPeer, Step
from benchmarks.peers.work import Work


class EquinoxPeer(JaxPeer):
    """`equinox.internal.scan(kind="checkpointed")`.

    Args:
        work: What to do.
        checkpoints: Kept states; None leaves the number to equinox, about sqrt(2 T).
    """

    def __init__(self, work: Work, *, checkpoints: int | None = None) -> None:
        super().__init__(work)
        self.checkpoints = checkpoints

    def scan(self, step: Step, first: Carry, inputs: jax.Array, targets: jax.Array) -> Carry:
        return equinox.internal.scan(
            step, first, (inputs, targets), kind="checkpointed", checkpoints=self.checkpoints
        )[0]
