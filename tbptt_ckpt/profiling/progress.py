"""How far a long job has come, for whoever watches it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a job stands.

    Attributes:
        stage: What is being done.
        done: Rows of a profile, or steps of a training run, that are done.
        total: Those there will be.
        figures: What is known so far, in words for people.
    """

    stage: str
    done: int
    total: int
    figures: str = ""


Watch = Callable[[Progress], None]


def unwatched(progress: Progress) -> None:
    """Shows nothing."""
