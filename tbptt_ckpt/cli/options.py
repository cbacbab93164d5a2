"""Options of commands: each is written once, as a field of its command's configuration.

A field's annotation holds its type, its help text, and, where needed, a `Read`, a `Default`,
`Flags`, and a function that is given the option's name and value and raises `ArgumentError` for
values that cannot work. Nothing here needs torch, so that a `--help` is quick.
"""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Callable, Collection
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from types import FunctionType
from typing import (
    Annotated,
    Any,
    Concatenate,
    Generic,
    Literal,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

import typer

from tbptt_ckpt.arguments import check_positive_int
from tbptt_ckpt.errors import ArgumentError


@dataclass(frozen=True, slots=True)
class Read:
    """Makes a value of an option's name and text."""

    parse: Callable[[str, str], Any]


@dataclass(frozen=True, slots=True)
class Default:
    """What the help says of a default that does not speak for itself."""

    shown: str


class Flags(tuple[str, ...]):
    """Names of an option on the command line, in order, where its field's is not the only one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """What a command is asked for: a field for every option."""

    given: tuple[str, ...] = field(default=(), compare=False, repr=False)  # not left to defaults

    def check(self) -> None:
        """Raise `ArgumentError` for options that cannot work, before anything is started."""
        for option in _options_of(type(self)):
            option.check(getattr(self, option.name))

    def refuse(self, names: Collection[str], reason: str) -> None:
        """Raise `ArgumentError` for the first of these options that is given: it does nothing."""
        for option in _options_of(type(self)):
            if option.name in names and option.name in self.given:
                raise ArgumentError(f"{option.flags[0]} would change nothing: {reason}")


C = TypeVar("C", bound=Configuration)


class Command(Generic[C]):
    """A function for typer: a configuration's fields are its options, `--config` a file of them.

    What it runs takes the configuration, and by keyword options of its own.
    """

    def __init__(self, configuration: type[C], act: Callable[Concatenate[C, ...], None]) -> None:
        self._configuration, self._act = configuration, act
        self._options = _options_of(configuration)
        _, *own = inspect.signature(act, eval_str=True).parameters.values()
        known = [_parameter("context", typer.Context), *(o.parameter() for o in self._options)]
        config = _parameter("config", Annotated[Path | None, _CONFIG], None)
        self.__signature__ = inspect.Signature([*known, config, *own])
        self.__annotations__: dict[str, Any] = {}  # all are in the signature
        self.__name__, self.__doc__ = act.__name__, act.__doc__

    def __call__(self, context: typer.Context, config: Path | None, **given: Any) -> None:
        """Read the options and run the command."""
        names = [option.name for option in self._options]
        sources = [(name, context.get_parameter_source(name)) for name in names]
        known = tuple(name for name, source in sources if source and source.name != "DEFAULT")
        values = {option.name: option.value(given.pop(option.name)) for option in self._options}
        self._act(self._configuration(**values, given=known), **given)


def _use_file(context: typer.Context, path: Path | None) -> Path | None:
    """Take defaults from a TOML file, whose keys are the names of options."""
    if path is None:
        return None
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArgumentError(f"--config {path} cannot be read: {error}") from error
    known = {parameter.name for parameter in context.command.params}
    defaults = {key.replace("-", "_"): value for key, value in found.items()}
    for name, value in defaults.items():
        if name not in known or name == "config":
            raise ArgumentError(f"--config {path}: {name} is no option of {context.info_name}")
        if isinstance(value, list):
            defaults[name] = ",".join(map(str, value))
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


def path_of(text: str) -> Path:
    """A path; an empty one would be the working directory."""
    if not text:
        raise typer.BadParameter("it is empty; write the path of a file or a directory, such as .")
    return Path(text)


_CONFIG = typer.Option(
    "--config",
    is_eager=True,
    callback=_use_file,
    parser=path_of,
    metavar="PATH",
    help="Take options from this TOML file: k2 = 512",
)


def _parameter(
    name: str, annotation: Any, default: Any = inspect.Parameter.empty
) -> inspect.Parameter:
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, keyword, default=default, annotation=annotation)


class _Option:
    """A field of a configuration."""

    def __init__(self, field: Field[Any], annotation: Any) -> None:
        self.name, self._default = field.name, field.default
        self._kind, *marks = get_args(annotation)
        self._marks = {type(mark): mark for mark in marks}
        self._refuse = self._marks.get(FunctionType)
        self.flags = self._marks.get(Flags, (f"--{field.name.replace('_', '-')}",))

    def parameter(self) -> inspect.Parameter:
        """What typer is to know: an option whose text is read here is text to it."""
        kind, default = self._kind, self._default
        if Read in self._marks:
            default = _as_text(default)
            kind = str if default is not None else str | None
        shown = self._marks[Default].shown if Default in self._marks else True
        said, metavar = self._marks[str], None
        if get_origin(kind) is Literal:
            said, metavar = f"{', '.join(get_args(kind))}. {said}", "<name>"
        parser = path_of if kind in (Path, Path | None) else None
        metavar = metavar if parser is None else "PATH"
        option = typer.Option(
            *self.flags, help=said, show_default=shown, metavar=metavar, parser=parser
        )
        return _parameter(self.name, Annotated[kind, option], default)

    def value(self, given: Any) -> Any:
        """The field's value for what typer found."""
        if Read not in self._marks:
            return given
        return self._default if given is None else self._marks[Read].parse(self.flags[0], given)

    def check(self, value: Any) -> None:
        """Raise `ArgumentError` for a value, or an item of a list, that cannot work."""
        for item in value if isinstance(value, tuple) else (value,):
            if self._refuse is not None and item is not None:
                self._refuse(self.flags[0], item)


def _options_of(configuration: type[Any]) -> list[_Option]:
    annotations = get_type_hints(configuration, include_extras=True)
    named = [field for field in fields(configuration) if field.name != "given"]
    return [_Option(field, annotations[field.name]) for field in named]


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


def parse_reach(option: str, text: str) -> int | str | None:
    """A number of steps, None for `none`, or `auto`."""
    if text.lower() in ("none", "auto"):
        return None if text.lower() == "none" else "auto"
    try:
        return int(text)
    except ValueError:
        raise ArgumentError(f"{option} {text} is neither a number of steps nor none") from None


def check_reach(option: str, steps: int | str) -> None:
    """Refuse what is neither a number of steps nor `auto`."""
    if steps != "auto":
        check_positive_int(option, steps, "none (reach back to the start)")


def check_strategy(option: str, text: str) -> None:
    """Refuse what names no strategy."""
    from tbptt_ckpt.schedule.strategies import parse_strategy

    try:
        parse_strategy(text)
    except ArgumentError as error:
        names = "auto, optimal, retain, sqrt, step, uniform:LENGTH, revolve:STATES"
        raise ArgumentError(f"{option} {text} is not one of {names}") from error


def check_truncation(option: str, text: str) -> None:
    """Refuse what names no truncation."""
    from tbptt_ckpt.schedule.truncation import parse_truncation

    try:
        parse_truncation(text)
    except ArgumentError as error:
        names = "fixed, roulette, roulette:P with a probability P such as 0.8"
        raise ArgumentError(f"{option} {text} is not one of {names}") from error


def read_compile(text: str) -> bool | str:
    """How steps are compiled: `true`, `false`, or a name."""
    return {"true": True, "false": False}.get(text.lower(), text)


def check_compile(option: str, text: str) -> None:
    """Refuse what names no way to compile steps."""
    from tbptt_ckpt.time_batching.compiler import check_compile

    try:
        check_compile(option, read_compile(text))
    except ArgumentError as error:
        raise ArgumentError(
            f"{option} {text} is not one of true, false, auto, or a backend such as inductor"
        ) from error


def check_budget(option: str, text: str) -> None:
    """Refuse what is neither a size nor a part of the free memory."""
    from tbptt_ckpt.budget.amount import parse_budget

    parse_budget(text, option)


def _parse_size(option: str, text: str) -> int:
    from tbptt_ckpt.memory.sizes import parse_bytes

    return parse_bytes(text, option)


SIZE, TEXTS = Read(_parse_size), read_list(lambda _, text: text)
NUMBERS = read_list(lambda _, text: float(text))
WHOLE_NUMBERS = read_list(lambda _, text: int(text))
Overlap = Literal["refresh", "stale"]
ExecutorName = Literal["replay", "checkpoint"]
Dtype = Literal["float32", "float64", "bfloat16"]
