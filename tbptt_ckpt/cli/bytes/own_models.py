"""The user's models: finding the factory and calling it."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from tbptt_ckpt.cli.bytes.contract import in_one_line
from tbptt_ckpt.errors import ArgumentError


def call_factory(name: str, offered: dict[str, int]) -> nn.Module:
    """The module that the factory makes; it gets those of the offered arguments that it takes.

    Args:
        name: `package.module:factory`, where the current directory can be imported from, or
            `path/to/file.py:factory`.
        offered: Keyword arguments.

    Raises:
        ArgumentError: No such factory, or one that is no use.
    """
    factory = _find_factory(name)
    arguments = _accepted(name, factory, offered)
    try:
        module = factory(**arguments)
    except Exception as error:
        raise ArgumentError(f"--model {name} raised {in_one_line(error)}") from error
    if not isinstance(module, nn.Module):
        raise ArgumentError(f"--model {name} returned {type(module).__name__}, not an nn.Module")
    if not any(p.requires_grad for p in module.parameters()):
        raise ArgumentError(f"--model {name} returned a module without trainable parameters")
    return module


def _find_factory(name: str) -> Callable[..., Any]:
    module_name, _, attribute = name.rpartition(":")
    here = str(Path.cwd())
    if here not in sys.path:  # an installed script's path begins elsewhere
        sys.path.insert(0, here)
    try:
        factory: Any = _import(module_name)
        for part in attribute.split("."):
            factory = getattr(factory, part)
    except Exception as error:
        raise ArgumentError(f"--model {name} cannot be found: {in_one_line(error)}") from error
    if not callable(factory):
        raise ArgumentError(f"--model {name} is {type(factory).__name__}, not a factory to call")
    found: Callable[..., Any] = factory
    return found


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


def _accepted(name: str, factory: Callable[..., Any], offered: dict[str, int]) -> dict[str, int]:
    """Those of the offered arguments that the factory takes by keyword."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except ValueError:  # some callables written in C have none
        return {}
    needed = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    unknown = [wanted for wanted in needed if wanted not in offered]
    if unknown:
        raise ArgumentError(
            f"--model {name} needs the argument {unknown[0]!r}; offered are {', '.join(offered)}"
        )
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return offered
    taken = {p.name for p in parameters}
    return {key: value for key, value in offered.items() if key in taken}
