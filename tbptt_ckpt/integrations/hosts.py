"""The libraries of others, which are imported where they are used and need not be there."""

from __future__ import annotations

import importlib
from typing import Any

from tbptt_ckpt.errors import ArgumentError


def imported(name: str, extra: str) -> Any:
    """A module of another library.

    Raises:
        ArgumentError: The library is missing.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise  # something that the library needs
        raise ArgumentError(
            f"the package {package} is missing: pip install 'tbptt-ckpt[{extra}]'"
        ) from error
