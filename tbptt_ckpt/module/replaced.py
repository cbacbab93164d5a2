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
        # By place: the function found, its replacement, and whether the owner inherits it.
        # Made once: compiled code is compiled again for another function.
        self._made: dict[tuple[Any, str], tuple[Function, Function, bool]] = {}

    def open(self) -> None:
        """A region begins."""
        with self._lock:
            if self._open == 0:
                for place, make in self._makers.items():
                    owner, name = place
                    found, made = getattr(owner, name), self._made.get(place)
                    if made is None or made[0] is not found:
                        made = self._made[place] = found, make(found), name not in vars(owner)
                    setattr(owner, name, made[1])
            self._open += 1

    def close(self) -> None:
        """A region ends."""
        with self._lock:
            self._open -= 1
            if self._open == 0:
                for (owner, name), (found, replacement, is_inherited) in self._made.items():
                    if getattr(owner, name) is not replacement:
                        continue
                    if is_inherited:
                        delattr(owner, name)
                    else:
                        setattr(owner, name, found)
