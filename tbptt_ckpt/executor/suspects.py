"""Leaves that may not be the runs that they repeat."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tbptt_ckpt.executor.fingerprint import Fingerprint


@dataclass(frozen=True, slots=True)
class Reached:
    """What a run gave at its end, and where the generators stood then."""

    seen: Fingerprint
    generators: int


@dataclass(frozen=True, slots=True)
class Suspect:
    """A leaf, what was reached at its end before, and what it reached."""

    start: int
    stop: int
    before: Reached
    reached: Reached

    def is_near(self) -> bool:
        """Whether both are equal, or apart by what rounding explains."""
        return self.reached.seen.is_near(self.before.seen)

    def with_prints(self, before: Fingerprint, reached: Fingerprint) -> Suspect:
        """The same with what was read of both."""
        both = replace(self.before, seen=before), replace(self.reached, seen=reached)
        return replace(self, before=both[0], reached=both[1])
