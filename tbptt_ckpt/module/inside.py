"""What a module is made of: through methods, functions and wrappers to the modules inside."""

from __future__ import annotations

import functools
import inspect
from contextlib import suppress
from typing import TypeGuard

from torch import nn

# Packages whose modules with a `module` inside run it as it is.
_WRAPPING = {"torch", "lightning", "lightning_fabric", "pytorch_lightning", "accelerate"}


def owner_of(function: object) -> object:
    """The module that a bound method or a `functools.partial` calls, otherwise what was given."""
    while isinstance(function, functools.partial):
        function = function.func
    owner = getattr(function, "__self__", None)
    return owner if isinstance(owner, nn.Module) else function


def unwrapped(module: object) -> object:
    """What compiled, averaged and parallel modules call; other modules as they are."""
    while isinstance(module, nn.Module):
        inner = getattr(module, "_orig_mod", None)
        if inner is None and type(module).__module__.partition(".")[0] in _WRAPPING:
            inner = getattr(module, "module", None)
        if not isinstance(inner, nn.Module):
            break
        module = inner
    return module


def modules_in(module: object) -> list[tuple[str, nn.Module]]:
    """The modules of the one that is given or whose method it is, or those that a function names.

    Each comes with its name.
    """
    owner, roots = owner_of(module), list[object]()
    if isinstance(owner, nn.Module):
        roots = [owner]
    elif inspect.isfunction(owner):
        with suppress(ValueError):  # a name without a value yet
            names = inspect.getclosurevars(owner)
            roots = [*map(owner_of, (*names.nonlocals.values(), *names.globals.values()))]
    return [pair for root in roots if isinstance(root, nn.Module) for pair in root.named_modules()]


def recurrent_layers(module: object) -> list[tuple[str, nn.RNNBase]]:
    """The `nn.RNN/LSTM/GRU` inside, scripted ones included."""
    return [(name, layer) for name, layer in modules_in(module) if _is_layer(layer)]


def _is_layer(module: nn.Module) -> TypeGuard[nn.RNNBase]:
    return isinstance(module, nn.RNNBase) or (
        kind_of(module) in ("RNN", "LSTM", "GRU") and hasattr(module, "batch_first")
    )


def kind_of(module: nn.Module) -> str:
    """The name of its class, before it was scripted."""
    return str(getattr(module, "original_name", type(module).__name__))


def name_of(module: object) -> str:
    """What a module is called in messages."""
    return getattr(module, "__name__", type(module).__name__)
