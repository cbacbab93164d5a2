"""What public functions and classes are given is held against their annotations.

`@checked` does it for a function or a constructor, `check_fields` for a dataclass. A value that
does not fit is one `ArgumentError` that names the argument, the value and what would work.
"""

from __future__ import annotations

import errno
import functools
import inspect
import math
import os
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, repeat
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    ParamSpec,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from tbptt_ckpt.errors import ArgumentError, shown

P = ParamSpec("P")
R = TypeVar("R")
Check = Callable[[str, Any], None]
Test = Callable[[Any], bool]
Refuse = Callable[..., None]  # of a name, a value, and what may stand in for it


def refused(name: str, value: object, words: str, alternative: str | None) -> ArgumentError:
    """The error for a value, where these words say what works."""
    also = f", or {alternative}" if alternative else ""
    return ArgumentError(f"{name}={shown(value)} must be {words}{also}")


def _of_ints(least: int) -> Refuse:
    def check(name: str, value: Any, alternative: str | None = None) -> None:
        is_int = isinstance(value, int) and not isinstance(value, bool)
        if not (is_int and least <= value <= sys.maxsize):
            most = f" and at most {sys.maxsize}" if is_int and value > 1 else ""
            raise refused(name, value, f"an integer of at least {least}{most}", alternative)

    return check


def _of_numbers(works: Callable[[float], bool], words: str) -> Refuse:
    def check(name: str, value: Any, alternative: str | None = None) -> None:
        if not (_is_number(value) and works(value)):
            raise refused(name, value, words, alternative)

    return check


# Each raises `ArgumentError` unless a value fits, which `alternative` may stand in for.
check_positive_int, check_dimension = _of_ints(1), _of_ints(0)
check_above_zero = _of_numbers(lambda number: number > 0, "a positive number")
check_finite = _of_numbers(lambda number: abs(number) < math.inf, "a finite number")
check_size = _of_numbers(lambda n: 0 <= n < math.inf, "a finite number of at least 0")


def check_path(name: str, value: object, alternative: str | None = None) -> None:
    """Raise `ArgumentError` unless `value` is a path that a file system can have."""
    usable = isinstance(value, str | Path) and value != ""  # which is the working directory
    try:
        os.lstat(value if isinstance(value, str | Path) else "")
    except ValueError:  # what no name can hold
        usable = False
    except OSError as error:  # it need not exist
        usable = usable and error.errno != errno.ENAMETOOLONG
    if not usable:
        raise refused(name, value, "a path that a file system can have", alternative)


def checked_where_used(name: str, value: object, alternative: str | None = None) -> None:
    """Nothing is raised here: what uses the value has more to say about it."""


# Kinds of arguments: a type, and what raises for values that the type alone does not tell.
PositiveInt = Annotated[int, check_positive_int]
Dimension = Annotated[int, check_dimension]
Size = Annotated[float, check_size]
Finite = Annotated[float, check_finite]
AboveZero = Annotated[float, check_above_zero]
AnyPath = Annotated[str | Path, check_path]


@functools.cache
def _checks(owner: Any) -> dict[str, Check]:
    """One for every annotation that something does not fit; made once, so that a call is cheap."""
    hints = get_type_hints(owner, include_extras=True)
    hints.pop("_", None)  # where a dataclass says that only keywords follow
    return {name: _check_of(hint) for name, hint in hints.items() if not _takes_all(hint)}


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """The function, with what it is given held against its annotations first.

    The items of containers are looked at too. An `Annotated` type has a function that raises for
    values which the type alone does not tell. An argument costs some tenths of a microsecond.
    """
    known = inspect.signature(function).parameters.values()
    by_place = [p.name for p in known if p.kind < inspect.Parameter.VAR_POSITIONAL]
    collecting = {p.name for p in known if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        checks = _checks(function)
        for name, value in chain(zip(by_place, args, strict=False), kwargs.items()):
            if name in checks and name not in collecting:
                checks[name](name, value)
        return function(*args, **kwargs)

    return call


def check_fields(instance: Any) -> None:
    """The same for the fields of a dataclass, in its `__post_init__`."""
    kind: Any = type(instance)
    for name, check in _checks(kind).items():
        check(name, getattr(instance, name))


def _check_of(hint: Any) -> Check:
    choices = _choices(hint)
    words = [_words(choice) for choice in choices if get_origin(choice) is Literal]
    words += ["None"] * (types.NoneType in choices and len(choices) > 1)
    alternative = ", or ".join(words) or None
    annotated = [choice for choice in choices if get_origin(choice) is Annotated]
    tests = [_test_of(choice) for choice in choices if choice not in annotated]
    further = [(_test_of(choice), choice.__metadata__[0]) for choice in annotated]
    says_it = further[0][1] if len(further) == 1 == len(choices) - len(words) else None

    def check(name: str, value: Any) -> None:
        for fits in tests:
            if fits(value):
                return
        raises = says_it or next((raises for fits, raises in further if fits(value)), None)
        if raises is None:
            raise ArgumentError(f"{name}={shown(value)} must be {_described(choices)}")
        raises(name, value, alternative)

    return check


def _choices(hint: Any) -> list[Any]:
    if get_origin(hint) in (Union, types.UnionType):
        return [choice for item in get_args(hint) for choice in _choices(item)]
    return [hint]


def _takes_all(hint: Any) -> bool:
    return any(c in (Any, object) or isinstance(c, TypeVar) for c in _choices(hint))


def _test_of(hint: Any) -> Test:
    """Whether a value is of a type, which is no union."""
    origin, items = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _test_of_any(items[0])
    if origin is Literal:
        return lambda value: isinstance(value, str) and value in items
    if hint is bool:
        return lambda value: isinstance(value, bool)
    if hint is float:
        return _is_number
    if origin is Callable:
        return lambda value: callable(value) and not isinstance(value, type)
    kind = origin or hint
    try:
        isinstance(None, kind)
    except TypeError:  # a protocol of the user's side: what it asks for is seen when it is used
        return lambda _: True
    if origin is None:
        return lambda value: isinstance(value, kind) and not isinstance(value, bool)
    tests = [_test_of_any(item) for item in items if item is not ...]
    each = tests if origin is tuple and ... not in items else repeat(tests[0])
    return lambda value: (
        isinstance(value, kind) and not isinstance(value, str | bytes) and _items_fit(value, each)
    )


def _test_of_any(hint: Any) -> Test:
    tests = [_test_of(choice) for choice in _choices(hint)]
    return lambda value: any(fits(value) for fits in tests)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, float | int):
        return False
    return value == value and (isinstance(value, float) or abs(value) <= sys.float_info.max)


def _items_fit(value: Any, each: Iterable[Test]) -> bool:
    if isinstance(value, Sequence):
        items = value if isinstance(value, tuple | list) else value[:1]
        return all(fits(item) for fits, item in zip(each, items, strict=False))
    try:
        iter(value)
    except Exception:  # a tensor without dimensions; a class of the user's
        return not isinstance(value, Iterable)
    return True


def _described(choices: Sequence[Any]) -> str:
    words = [_words(choice) for choice in choices if choice is not types.NoneType]
    return " or ".join(words) + (", or None" if len(words) < len(choices) else "")


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
        return "callable: a function or a module, and no class"
    known = {int: "an integer", float: "a number", bool: "True or False", str: "text"}
    known |= {Path: "a path"}
    if hint in known:
        return known[hint]
    module = hint.__module__.partition(".")[0]
    return f"a {module}.{hint.__qualname__}" if module == "torch" else str(hint.__qualname__)
