"""What a peer is: something that does the work, and can say what it took."""

from __future__ import annotations

from typing import Protocol

from benchmarks.peers.work import Arrays


class Peer(Protocol):
    """One way of doing the work, in one process, with one set of options."""

    def warm_up(self) -> None:
        """Do what a long run does once: compile, calibrate, touch every code path."""
        ...

    def run(self) -> float:
        """One forward and backward over the whole sequence; returns the loss."""
        ...

    def gradients(self) -> Arrays:
        """Gradients of the last run, named and laid out as `Work.weights`."""
        ...

    def peak_bytes(self) -> int:
        """Peak of temporaries of one run in bytes: above weights, gradients and inputs."""
        ...
