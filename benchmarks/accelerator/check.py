"""A named check with the figures that decide it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.accelerator.bench import Bench

OK, FAIL, INFO, SKIPPED = "ok", "FAIL", "info", "skipped"


@dataclass(frozen=True)
class Check:
    """What was looked at, and what came of it.

    Attributes:
        what: What was looked at.
        verdict: "ok" or "FAIL" where something is promised, "info" where nothing is, "skipped".
        figures: Numbers and words, by name.
        section: Where it belongs.
    """

    what: str
    verdict: str
    figures: dict[str, Any] = field(default_factory=dict)
    section: str = ""

    def line(self) -> str:
        """For those who wait."""
        shown = "  ".join(f"{name} {_shown(value)}" for name, value in self.figures.items())
        return f"{self.verdict:8}{self.section:15}{self.what}  {shown}".rstrip()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


Section = Callable[[Bench], Iterator[Check]]


def promised(is_kept: bool, what: str, **figures: Any) -> Check:
    """One of something that is promised."""
    return Check(what, OK if is_kept else FAIL, figures)


def info(what: str, **figures: Any) -> Check:
    """One of something that nobody promised."""
    return Check(what, INFO, figures)


def skipped(what: str, why: str) -> Check:
    """One that could not be made."""
    return Check(what, SKIPPED, {"why": why})


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
