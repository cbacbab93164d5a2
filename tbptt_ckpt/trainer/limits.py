"""A source cut to its first steps."""

from __future__ import annotations

from collections.abc import Sized
from itertools import islice
from typing import Any

from tbptt_ckpt.sources import Source
from tbptt_ckpt.state import Tree


def limited(source: Any, num_steps: int) -> Any:
    """The first `num_steps` steps of a source or an iterable of steps."""
    if not isinstance(source, Source):
        return islice(source, num_steps)
    return SizedPart(source, num_steps) if isinstance(source, Sized) else Part(source, num_steps)


class Part:
    """The first steps of a source of unknown length; all else is the source's own."""

    def __init__(self, source: Any, num_steps: int) -> None:
        self._source, self._num_steps = source, num_steps

    def read(self, start: int, stop: int) -> tuple[Tree, Tree]:
        """The source's steps, as long as there may be any."""
        stop = min(stop, self._num_steps)
        result: tuple[Tree, Tree] = self._source.read(start, stop) if start < stop else ((), None)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


class SizedPart(Part):
    """The first steps of a source with a length."""

    def __len__(self) -> int:
        return min(len(self._source), self._num_steps)
