"""What public functions and classes are given is held against their annotations.

`@checked` does it for a function or a constructor, `check_fields` for a dataclass. A value that
does not fit is one `ArgumentError` that names the argument, the value and what would work.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin
from typing import get_type_hints as hints_of

from tbptt_ckpt.errors import (
    ArgumentError,
    check_dimension,
    check_positive_int,
    check_type,
    shown,
)

P = ParamSpec("P")
R = TypeVar("R")


def check_above_zero(name: str, value: object, alternative: str | None = None) -> None:
    """Raise `ArgumentError` unless `value` is a number above 0."""
    _check_number(name, value, lambda number: number > 0, "a positive number", alternative)


def check_size(name: str, value: object, alternative: str | None = None) -> None:
    """Raise `ArgumentError` unless `value` is finite and not negative."""
    words = "a finite number of at least 0"
    _check_number(name, value, lambda number: 0 <= number < math.inf, words, alternative)


def check_finite(name: str, value: object, alternative: str | None = None) -> None:
    """Raise `ArgumentError` unless `value` is a finite number."""
    _check_number(name, value, math.isfinite, "a finite number", alternative)


def _check_number(
    name: str, value: Any, works: Callable[[float], bool], words: str, alternative: str | None
) -> None:
    if not (_is_kind(value, float) and works(value)):
        also = f", or {alternative}" if alternative else ""
        raise ArgumentError(f"{name}={shown(value)} must be {words}{also}")


def check_path(name: str, value: Any, alternative: str | None = None) -> None:
    """Raise `ArgumentError` unless `value` is a path that a file system can have."""
    also = f", or {alternative}" if alternative else ""
    check_type(name, value, str | Path, f"a path{also}")
    try:
        usable = b"\0" not in os.fsencode(value)
    except UnicodeError:
        usable = False
    if not usable:
        raise ArgumentError(f"{name}={shown(value)} must be a path that a file system can have")


# Kinds of arguments: a type, and what raises for values that the type alone does not tell.
PositiveInt = Annotated[int, check_positive_int]
Dimension = Annotated[int, check_dimension]
Size = Annotated[float, check_size]
Finite = Annotated[float, check_finite]
AboveZero = Annotated[float, check_above_zero]
AnyPath = Annotated[str | Path, check_path]


@functools.cache
def _hints(owner: Any) -> dict[str, Any]:
    return hints_of(owner, include_extras=True)


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """The function, with what it is given held against its annotations first.

    The items of containers are looked at too. An `Annotated` type has a function that raises for
    values which the type alone does not tell.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:
            given = {}  # the call itself says it
        hints = _hints(function)
        for name, value in given.items():
            if signature.parameters[name].kind < inspect.Parameter.VAR_POSITIONAL or (
                signature.parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
            ):
                _check(name, value, hints.get(name, Any))
        return function(*args, **kwargs)

    return call


def check_fields(instance: Any) -> None:
    """The same for the fields of a dataclass, in its `__post_init__`."""
    kind: Any = type(instance)
    for name, hint in _hints(kind).items():
        _check(name, getattr(instance, name), hint)


def _check(name: str, value: Any, hint: Any) -> None:
    choices = list(_choices(hint))
    others = "None" if types.NoneType in choices and len(choices) > 1 else None
    fitting = [choice for choice in choices if _fits(value, choice)]
    special = [choice for choice in fitting or choices if get_origin(choice) is Annotated]
    if fitting and len(special) < len(fitting):
        return
    if special and (fitting or len(special) == len(choices) - bool(others)):
        special[0].__metadata__[0](name, value, others)
    elif not fitting:
        raise ArgumentError(f"{name}={shown(value)} must be {_described(choices)}")


def _choices(hint: Any) -> Iterator[Any]:
    if get_origin(hint) in (Union, types.UnionType):
        for choice in get_args(hint):
            yield from _choices(choice)
    else:
        yield hint


def _can_iterate(value: Any) -> bool:
    try:
        iter(value)
    except Exception:  # a tensor without dimensions; a class of the user's
        return False
    return True


def _fits(value: Any, hint: Any) -> bool:
    origin, items = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return any(_fits(value, choice) for choice in _choices(items[0]))
    if origin is Literal:
        return isinstance(value, str) and value in items
    if origin is None:
        return hint in (Any, object) or isinstance(hint, TypeVar) or _is_kind(value, hint)
    if not isinstance(origin, type):
        return True
    if not isinstance(value, origin) or isinstance(value, str | bytes):
        return False
    if issubclass(origin, Iterable) and not _can_iterate(value):
        return False
    if isinstance(value, Sequence):
        value = value if isinstance(value, tuple | list) else value[:1]
        each = repeat(items[0]) if origin is not tuple or ... in items else items
        return all(
            any(_fits(i, c) for c in _choices(kind)) for i, kind in zip(value, each, strict=False)
        )
    return True


def _is_kind(value: Any, kind: Any) -> bool:
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, float | int) and value == value
    try:
        return isinstance(value, kind)
    except TypeError:  # a protocol of the user's side: what it asks for is seen when it is used
        return True


def _described(choices: Iterable[Any]) -> str:
    words = [_words(choice) for choice in choices if choice is not types.NoneType]
    none = [", or None"] if len(words) < len(list(choices)) else []
    return " or ".join(words) + "".join(none)


def _words(hint: Any) -> str:
    origin, items = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _words(items[0])
    if origin is Literal:
        return " or ".join(map(repr, items))
    if origin is not None and issubclass(origin, Mapping):
        return "a dict"
    if origin is not None and issubclass(origin, Iterable):
        each = _words(items[0]).removeprefix("a ").removeprefix("an ") if items else "item"
        return f"a list of {each}s"
    if origin is not None:
        return "a function"
    known = {
        int: "an integer",
        float: "a number",
        bool: "True or False",
        str: "text",
        Path: "a path",
    }
    if hint in known:
        return known[hint]
    module = hint.__module__.partition(".")[0]
    return f"a {module}.{hint.__qualname__}" if module == "torch" else str(hint.__qualname__)
