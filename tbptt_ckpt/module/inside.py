"""What a module is made of: through methods, functions and wrappers to the modules inside."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeGuard

import torch
from torch import nn

OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # attributes
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
    function = getattr(owner, "_torchdynamo_orig_callable", owner)  # of a compiled one
    if isinstance(owner, nn.Module):
        roots = [owner]
    elif inspect.isfunction(function):
        roots = [*map(owner_of, values_named_in(function))]
    return [pair for root in roots if isinstance(root, nn.Module) for pair in root.named_modules()]


def values_named_in(function: Callable[..., Any]) -> list[object]:
    """What the names of a function stand for; nothing while one of them has no value yet."""
    with suppress(ValueError):
        names = inspect.getclosurevars(function)
        return [*names.nonlocals.values(), *names.globals.values()]
    return []


def is_compiled(module: object) -> bool:
    """Whether any of it is compiled, so that a hook would have it compiled again."""
    owner = owner_of(module)
    return any(hasattr(owner, name) for name in ("_orig_mod", "_torchdynamo_orig_callable")) or any(
        getattr(inner, "_compiled_call_impl", None) is not None for _, inner in modules_in(owner)
    )


def recurrent_layers(module: object) -> list[tuple[str, nn.RNNBase]]:
    """The `nn.RNN/LSTM/GRU` inside, scripted ones included."""
    return [(name, layer) for name, layer in modules_in(module) if is_layer(layer)]


def is_layer(module: object) -> TypeGuard[nn.RNNBase]:
    """Whether it is an `nn.RNN/LSTM/GRU`, scripted perhaps."""
    return isinstance(module, nn.RNNBase) or _is_scripted(module, "RNN", "LSTM", "GRU")


def is_cell(module: object) -> TypeGuard[nn.RNNCellBase]:
    """Whether it is a cell of torch's, scripted perhaps."""
    names = ("RNNCell", "LSTMCell", "GRUCell")
    return isinstance(module, nn.RNNCellBase) or _is_scripted(module, *names)


def _is_scripted(module: object, *names: str) -> bool:
    return isinstance(module, torch.jit.ScriptModule) and kind_of(module) in names


def is_a(module: object, package: str, *names: str) -> bool:
    """Whether a class of such a name, and of that package, is among a module's."""
    return any(
        kind.__name__ in names and kind.__module__.partition(".")[0] == package
        for kind in type(module).__mro__
    )


def kind_of(module: object) -> str:
    """The name of its class, before it was scripted."""
    return str(getattr(module, "original_name", type(module).__name__))


def name_of(module: object) -> str:
    """What a module is called in messages."""
    return getattr(module, "__name__", type(module).__name__)
