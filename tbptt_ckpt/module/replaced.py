"""Functions of torch that are replaced while somebody needs it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

Function = Callable[..., Any]


class ReplacedFunctions:
    """Functions that are replaced while at least one region is open, in any thread.

    torch's functions are shared by all threads: a replacement looks its own thread's region up,
    and calls the function that it stands for where there is none. That function is the one found
    when the first region opens, so that a patch made by others is called too. A patch that
    others put over a replacement stays where it is. `makers` are given by owner and name of a
    function, and make its replacement from it.
    """

    def __init__(self, makers: Mapping[tuple[Any, str], Callable[[Function], Function]]) -> None:
        self._makers = makers
        self._lock, self._open = threading.Lock(), 0
        # Replacements are made once: compiled code is compiled again for another function.
        self._made: dict[tuple[Any, str], tuple[Function, Function]] = {}
        self._inherited: set[tuple[Any, str]] = set()

    def open(self) -> None:
        """A region begins."""
        with self._lock:
            if self._open == 0:
                for place in self._makers:
                    self._replace(*place)
            self._open += 1

    def close(self) -> None:
        """A region ends."""
        with self._lock:
            self._open -= 1
            if self._open == 0:
                for place in self._makers:
                    self._put_back(*place)

    def _replace(self, owner: Any, name: str) -> None:
        place, found = (owner, name), getattr(owner, name)
        if place not in self._made or self._made[place][0] is not found:
            self._made[place] = found, self._makers[place](found)
        self._inherited.discard(place)
        if name not in vars(owner):
            self._inherited.add(place)
        setattr(owner, name, self._made[place][1])

    def _put_back(self, owner: Any, name: str) -> None:
        found, replacement = self._made[owner, name]
        if getattr(owner, name) is not replacement:
            return
        if (owner, name) in self._inherited:
            delattr(owner, name)
        else:
            setattr(owner, name, found)
