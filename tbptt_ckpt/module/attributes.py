"""What a module's attributes hold, and the names and containers that its functions use."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tbptt_ckpt.module.inside import OF_EVERY_MODULE
from tbptt_ckpt.module.step_effects import is_others_file
from tbptt_ckpt.module.trees import Tree, slots_of, structure, tensors_of

_PLAIN = (int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device)
_READ_ONCE = (int, float, bool, str, bytes, type(None))
_LONGEST = 100  # containers with more hold data
_SEARCHED = 1000  # containers and objects, and items of one; longer ones hold data


class Attributes:
    """What there was, to name what has changed, and to put it back.

    Containers and objects are looked through.
    """

    def __init__(self, module: nn.Module) -> None:
        used = list(_names_used(module))
        self._cells = [each for each in used if isinstance(each[0], CellType)]
        self._names = [each for each in used if isinstance(each[0], dict)]
        starts = [(type(part).__name__, vars(part)) for part in module.modules()]
        named = [(name, {name: value}) for _, name, value in used]
        self._held = [(name, each, _copied(each)) for name, each in _holders([*starts, *named])]
        self._buffers = {id(part._buffers) for part in module.modules()}
        self._weights = self._buffers | {id(part._parameters) for part in module.modules()}

    def changed(self, *, but_weights: bool = False) -> str | None:
        """What does not hold what it did; None where everything does, or all but weights."""
        for space, name, value in self._names:
            if not _is_same(space.get(name), value):
                return name
        for cell, name, value in self._cells:
            if not _is_same(cell.cell_contents, value):
                return name
        passed = self._weights if but_weights else ()
        held = ((n, now, then) for n, now, then in self._held if id(now) not in passed)
        return next((name for name, now, then in held if not _is_same_holder(now, then)), None)

    def put_back(self) -> None:
        """As everything was, but buffers, which are the business of others."""
        for space, name, value in self._names:
            if not _is_same(space.get(name), value):
                space[name] = value
        for _, now, then in self._held:
            if id(now) in self._buffers or _is_same_holder(now, then):
                continue
            if isinstance(now, np.ndarray):
                now[...] = then
            else:
                now.clear()
                (now.extend if isinstance(now, list | deque) else now.update)(then)


def _copied(holder: Any) -> Any:
    if isinstance(holder, np.ndarray):
        return holder.copy()
    if isinstance(holder, dict | set):
        return dict(holder) if isinstance(holder, dict) else set(holder)
    return list(holder)


def _is_same_holder(now: Any, then: Any) -> bool:
    if isinstance(now, np.ndarray):
        return bool(now.tobytes() == then.tobytes())
    if len(now) != len(then) or isinstance(now, set):
        return bool(now == then)
    if isinstance(now, dict):
        return now.keys() == then.keys() and all(_is_same(now[key], then[key]) for key in then)
    return all(map(_is_same, now, then))


def _is_same(now: object, then: object) -> bool:
    return now is then or (type(now) is type(then) and type(now) in _PLAIN and now == then)


def _holders(starts: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    left, seen = list(starts), set[int]()
    for name, holder in left:  # grows
        if id(holder) in seen:
            continue
        seen.add(id(holder))
        yield name, holder
        if isinstance(holder, np.ndarray) or max(len(seen), len(holder)) > _SEARCHED:
            continue
        items = holder.items() if isinstance(holder, dict) else ((None, each) for each in holder)
        for key, item in items:
            path = f"{name}.{key}" if isinstance(key, str) else name
            for each in item if type(item) is tuple else (item,):
                if isinstance(each, list | dict | set | deque | np.ndarray):
                    left.append((path, each))
                elif not isinstance(each, nn.Module | type | ModuleType | Tensor | FunctionType):
                    inside = getattr(each, "__dict__", None)
                    left += [(path, inside)] if isinstance(inside, dict) else []
                    left += [(path, o) for o in slots_of(each) if isinstance(o, list | dict | set)]


def _names_used(module: nn.Module) -> Iterator[tuple[Any, str, Any]]:
    """Namespace or cell, name and value of what functions of a module's classes use by name."""
    left: list[tuple[nn.Module, Any]] = []
    for part in module.modules():
        own = [each for each in vars(part).values() if isinstance(each, FunctionType)]
        left += [(part, function) for function in (type(part).forward, *own)]
    seen = set[Any]()
    for part, function in left:  # grows
        code = getattr(function, "__code__", None)
        if code is None or code in seen or is_others_file(code.co_filename):
            continue
        seen.add(code)
        space = function.__globals__
        for name in _names_in(code):
            if name not in space or isinstance(space[name], ModuleType | type):
                left.append((part, getattr(type(part), name, None)))
            elif isinstance(space[name], FunctionType):
                left.append((part, space[name]))
            else:
                yield space, name, space[name]
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=False):
            try:
                value = cell.cell_contents
            except ValueError:  # not set yet
                continue
            left.append((part, value))
            if not isinstance(value, FunctionType | type):
                yield cell, name, value


def _names_in(code: CodeType) -> set[str]:
    inner = [_names_in(each) for each in code.co_consts if isinstance(each, CodeType)]
    return set(code.co_names).union(*inner)


def plain_attributes(module: nn.Module) -> object:
    """Numbers, texts and modes in the attributes of all modules inside, to compare.

    A trace has read them once. Hooks count by their number, modules and other tensors than
    weights and buffers by which they are.
    """
    return [
        (id(part), name, value if isinstance(value, _READ_ONCE) else _standing_for(name, value))
        for part in module.modules()
        for name, value in vars(part).items()
    ]


def look_of(module: nn.Module, *trees: Tree) -> object:
    """Types, shapes and dtypes of what a step of a module is made of and given, to compare.

    Lanes, the first dimension of what is given, do not count.
    """
    parts = [
        (name, None if t is None else (t.shape, t.dtype))
        for part in module.modules()
        for held in (part._parameters, part._buffers)
        for name, t in held.items()
    ]
    types = [(id(part), type(part), type(part).forward) for part in module.modules()]
    given = [(t.shape[1:], t.dtype) for t in tensors_of(trees)]
    return parts, types, given, structure(trees)


def _standing_for(name: str, value: object) -> object:
    if name in OF_EVERY_MODULE:  # weights and buffers may be others each time
        return len(value) if isinstance(value, dict) else id(value)
    if not isinstance(value, dict | tuple | list) or len(value) > _LONGEST:
        return id(value)
    if isinstance(value, dict):
        return tuple((key, _item(each)) for key, each in value.items())
    return tuple(map(_item, value))


def _item(value: object) -> object:
    return value if isinstance(value, _READ_ONCE) else id(value)
