"""Options of commands: each is written once, as a field of its command's configuration.

A field's annotation holds its type, its help text, and, where needed, a `Read`, a `Default`, and a
function that is given the option's name and value and raises `ArgumentError` for values that cannot
work.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import Field, dataclass, fields
from types import FunctionType
from typing import Annotated, Any, Concatenate, Generic, TypeVar, get_args, get_type_hints

import typer

from tbptt_ckpt.arguments import check_positive_int
from tbptt_ckpt.cli.devices import DTYPES
from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.memory.sizes import parse_bytes
from tbptt_ckpt.schedule.strategies import parse_strategy

C = TypeVar("C")


@dataclass(frozen=True, slots=True)
class Read:
    """Makes a value of an option's name and text."""

    parse: Callable[[str, str], Any]


@dataclass(frozen=True, slots=True)
class Default:
    """What the help says of a default that does not speak for itself."""

    shown: str


class Command(Generic[C]):
    """A function for typer: a configuration's fields are its options.

    What it runs takes the configuration, and by keyword options of its own.
    """

    def __init__(self, configuration: type[C], act: Callable[Concatenate[C, ...], None]) -> None:
        self._configuration, self._act = configuration, act
        self._options = _options_of(configuration)
        _, *own = inspect.signature(act, eval_str=True).parameters.values()
        self.__signature__ = inspect.Signature([*(o.parameter() for o in self._options), *own])
        self.__annotations__: dict[str, Any] = {}  # all are in the signature
        self.__name__, self.__doc__ = act.__name__, act.__doc__

    def __call__(self, **given: Any) -> None:
        """Read the options and run the command."""
        values = {option.name: option.value(given.pop(option.name)) for option in self._options}
        self._act(self._configuration(**values), **given)


class _Option:
    """A field of a configuration."""

    def __init__(self, field: Field[Any], annotation: Any) -> None:
        self.name, self._default = field.name, field.default
        self._flag = f"--{field.name.replace('_', '-')}"
        self._kind, *marks = get_args(annotation)
        self._marks = {type(mark): mark for mark in marks}
        self._refuse = self._marks.get(FunctionType)

    def parameter(self) -> inspect.Parameter:
        """What typer is to know: an option whose text is read here is text to it."""
        kind, default = self._kind, self._default
        if Read in self._marks:
            default = _as_text(default)
            kind = str if default is not None else str | None
        shown = self._marks[Default].shown if Default in self._marks else True
        flags = (self._flag,) if kind is bool else ()  # without a --no-...
        return inspect.Parameter(
            self.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=default,
            annotation=Annotated[
                kind, typer.Option(*flags, help=self._marks[str], show_default=shown)
            ],
        )

    def value(self, given: Any) -> Any:
        """The field's value for what typer found."""
        if Read not in self._marks:
            return given
        return self._default if given is None else self._marks[Read].parse(self._flag, given)

    def check(self, value: Any) -> None:
        """Raise `ArgumentError` for a value, or an item of a list, that cannot work."""
        for item in value if isinstance(value, tuple) else (value,):
            if self._refuse is not None and item is not None:
                self._refuse(self._flag, item)


def _options_of(configuration: type[Any]) -> list[_Option]:
    annotations = get_type_hints(configuration, include_extras=True)
    return [_Option(field, annotations[field.name]) for field in fields(configuration)]


def check_options(configuration: Any) -> None:
    """Raise `ArgumentError` for the first option whose own check refuses its value."""
    for option in _options_of(type(configuration)):
        option.check(getattr(configuration, option.name))


def _as_text(value: Any) -> str | None:
    """A default as the user would write it; None where nothing is written."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or None
    return None if value is None else str(value)


def read_list(parse: Callable[[str, str], Any]) -> Read:
    """Reads items separated by commas."""

    def parse_list(option: str, text: str) -> tuple[Any, ...]:
        items = [item.strip() for item in text.split(",") if item.strip()]
        if not items:
            raise ArgumentError(f"{option} names nothing; write one or several, such as 16,64")
        try:
            return tuple(parse(option, item) for item in items)
        except ArgumentError:
            raise
        except ValueError as error:
            message = f"{option} {text} is no list of whole numbers such as 16,64"
            raise ArgumentError(message) from error

    return Read(parse_list)


def check_readable(option: str, text: str, parse: Callable[[Any], object], what: str) -> None:
    """Raise `ArgumentError`, which names the option, where a parser refuses its text."""
    try:
        parse(text)
    except ArgumentError as error:
        raise ArgumentError(f"{option} {text} is {what}") from error


def one_of(*choices: str) -> Callable[[str, str], None]:
    """Refuses all but these."""

    def refuse(option: str, value: str) -> None:
        if value not in choices:
            raise ArgumentError(f"{option} {value} is not one of {', '.join(choices)}")

    return refuse


def check_strategy(option: str, text: str) -> None:
    """Refuse what names no strategy."""
    names = "auto, optimal, retain, sqrt, step, uniform:LENGTH, revolve:STATES"
    check_readable(option, text, parse_strategy, f"not one of {names}")


SIZE = Read(lambda option, text: parse_bytes(text, option))

# Options that several commands have, with one meaning and one help text.
Hidden = Annotated[int, "Width of the recurrent layers.", check_positive_int]
Layers = Annotated[int, "Recurrent layers.", check_positive_int]
Lanes = Annotated[int, "Parallel streams.", check_positive_int]
Overlap = Annotated[str, "refresh or stale.", one_of("refresh", "stale")]
ExecutorName = Annotated[str, "replay or checkpoint.", one_of("replay", "checkpoint")]
Dtype = Annotated[str, "float32, float64, or bfloat16 (autocast).", one_of(*DTYPES)]
Device = Annotated[str | None, "cpu, cuda, cuda:1 ...", Default("the accelerator, or else cpu")]
