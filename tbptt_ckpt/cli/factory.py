"""What is the user's own: `file.py:name` and `package.module:name`, found, and called."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from tbptt_ckpt.errors import ArgumentError


def call_factory(
    name: str, offered: Mapping[str, Any], given: Collection[str]
) -> tuple[Any, frozenset[str]]:
    """What a factory makes of those offered arguments that it takes by keyword, and their names.

    Its own defaults stand unless the user has `given` another value.
    """
    factory = find_object("--model", name)
    try:
        parameters: Mapping[str, inspect.Parameter] = inspect.signature(factory).parameters
    except ValueError:  # some callables written in C have none
        parameters = {}
    names = _accepted(name, parameters, offered)
    defaults = {key for key, p in parameters.items() if p.default is not p.empty} - {*given}
    wanted = {key: offered[key] for key in offered if key in names and key not in defaults}
    try:
        return factory(**wanted), names
    except Exception as error:
        raise ArgumentError(f"--model {name} raised {in_one_line(error)}") from error


def find_object(option: str, name: str) -> Callable[..., Any]:
    """The callable of that name; files and modules are looked for from the current directory."""
    module_name, _, attribute = name.rpartition(":")
    here = str(Path.cwd())
    if here not in sys.path:  # an installed script's path begins elsewhere
        sys.path.insert(0, here)
    try:
        found: Any = _import(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:
        raise ArgumentError(f"{option} {name} cannot be found: {in_one_line(error)}") from error
    if not callable(found):
        raise ArgumentError(f"{option} {name} is {type(found).__name__}, not something to call")
    return cast("Callable[..., Any]", found)


def _import(name: str) -> ModuleType:
    if not name.endswith(".py"):
        return importlib.import_module(name)
    path = Path(name).resolve()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{name} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses and pickle look their module up
    spec.loader.exec_module(module)
    return module


def _accepted(
    name: str, parameters: Mapping[str, inspect.Parameter], offered: Mapping[str, Any]
) -> frozenset[str]:
    """Names of those of the offered arguments that the factory takes by keyword."""
    various = [p for p in parameters.values() if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    for wanted, p in parameters.items():
        if p.default is p.empty and p not in various and wanted not in offered:
            raise ArgumentError(
                f"--model {name} needs the argument {wanted!r}; offered are {', '.join(offered)}"
            )
    takes_all = any(p.kind is p.VAR_KEYWORD for p in various)
    return frozenset(key for key in offered if takes_all or key in parameters)


def in_one_line(error: BaseException) -> str:
    """The error's type, message and notes, whatever lines they had."""
    words = [str(error), *getattr(error, "__notes__", ())]
    return f"{type(error).__name__}: {' '.join(' '.join(words).split())}"
