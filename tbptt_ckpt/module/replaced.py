"""Functions of torch that are replaced while somebody needs it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

Function = Callable[..., Any]

_stands_for: dict[Function, Function] = {}


def found_under(function: Function) -> Function:
    """What one of the replacements made here stands for; any other function as it is."""
    return _stands_for.get(function, function)


class ReplacedFunctions:
    """Functions that are replaced while at least one region is open, in any thread.

    torch's functions are shared by all threads: a replacement looks its own thread's region up,
    and calls the function that it stands for where there is none. That function is the one found
    when the first region opens, so that a patch made by others is called too. A patch that
    others put over a replacement stays where it is; one that ends by putting a replacement back,
    which it had found, has ended. `makers` are given by owner and name of a function, and make its
    replacement from it, or leave it as it is.
    """

    def __init__(self, makers: Mapping[tuple[Any, str], Callable[[Function], Function]]) -> None:
        self._makers = makers
        self._lock, self._open = threading.Lock(), 0
        # By place: the function found, its replacement, and whether the owner inherits it.
        # Made once: compiled code is compiled again for another function.
        self._made: dict[tuple[Any, str], tuple[Function, Function, bool]] = {}
        self._ours: dict[int, tuple[Function, Function, bool]] = {}  # by a replacement's id

    def open(self) -> None:
        """A region begins."""
        with self._lock:
            if self._open == 0:
                for place, make in self._makers.items():
                    owner, name = place
                    found, is_inherited = getattr(owner, name), name not in vars(owner)
                    made = self._ours.get(id(found), self._made.get(place))
                    if made is None or (found is not made[0] and found is not made[1]):
                        made = found, make(found), is_inherited
                        if made[1] is not found:
                            self._ours[id(made[1])] = made
                            _stands_for[made[1]] = found
                    self._made[place] = made
                    setattr(owner, name, made[1])
            self._open += 1

    def left(self) -> list[str]:
        """Names of the functions that are left as they are."""
        made = self._made.items()
        return [f"{o.__name__}.{name}" for (o, name), (found, ours, _) in made if ours is found]

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
