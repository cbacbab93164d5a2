"""JAX's `lax.scan`, differentiated as it is (everything kept) or nested with `jax.checkpoint`."""

from __future__ import annotations

import math

import jax

from benchmarks.peers.jax_peer import Carry, JaxPeer, Step


class ScanPeer(JaxPeer):
    """One scan; its backward keeps what every step needs."""

    def scan(self, step: Step, first: Carry, inputs: jax.Array, targets: jax.Array) -> Carry:
        return jax.lax.scan(step, first, (inputs, targets))[0]


class NestedScanPeer(JaxPeer):
    """A scan over segments of about sqrt(T) steps, each of them a checkpointed scan."""

    def scan(self, step: Step, first: Carry, inputs: jax.Array, targets: jax.Array) -> Carry:
        segments = divisor_near_root(len(inputs))

        @jax.checkpoint
        def segment(carry: Carry, part: tuple[jax.Array, jax.Array]) -> tuple[Carry, None]:
            return jax.lax.scan(step, carry, part)

        parts = (a.reshape(segments, -1, *a.shape[1:]) for a in (inputs, targets))
        return jax.lax.scan(segment, first, tuple(parts))[0]


def divisor_near_root(number: int) -> int:
    """The largest divisor up to the square root: the segments of a scan are equally long."""
    return next(d for d in range(math.isqrt(number), 0, -1) if number % d == 0)
