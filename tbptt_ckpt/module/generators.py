"""Random generators besides torch's default ones: Python's, numpy's, and those a module holds.

NOTE [Where a generator stands]
Whether one has moved is asked at every kept state. To say it, Python's global generator takes 15 us
and numpy's 100; their position and two of their words are read where they lie in memory. Where
they are not found there, the generators are asked.
"""

from __future__ import annotations

import ctypes
import inspect
import random
import sys
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tbptt_ckpt.module.inside import OF_EVERY_MODULE, values_named_in
from tbptt_ckpt.module.trees import bytes_of, iterate_leaves, slots_of

_KINDS = (
    random.Random,
    np.random.Generator,
    np.random.RandomState,
    np.random.BitGenerator,
    torch.Generator,
)
_SEARCHED = 10_000  # attributes and items
# What leads to no generator of a module's.
_PASSED = (type(None), bool, int, str, float, Tensor, bytes, type, ModuleType, FunctionType)
_PYTHONS, _NUMPYS = random._inst, np.random.mtrand._rand
_WORDS = 624  # of a Mersenne twister


@dataclass(frozen=True, slots=True, eq=False)
class GeneratorState:
    """Where a generator stood, in numbers, bytes, arrays and tensors.

    The generator is None where the state comes from another process.
    """

    generator: Any
    values: Any
    digest: int = field(init=False)

    def __post_init__(self) -> None:
        leaves = map(_hashable, iterate_leaves(self.values))
        object.__setattr__(self, "digest", hash(tuple(leaves)))


class GeneratorPlace:
    """A generator, or the attribute or item of a dict that holds one."""

    def __init__(self, generator: Any, holder: dict[Any, Any] | None = None, key: Any = None):
        self._holder, self._key = holder, key
        self._generator, self._mark = generator, _mark_of(generator)
        self._state: GeneratorState | None = None  # where it stood at `_seen`
        self._seen: object = None

    def capture(self) -> GeneratorState:
        """Where it stands; the same object as before where it has not moved."""
        if self._holder is not None:
            self._bind(self._present())
        mark, state = self._mark(), self._state
        if state is None or mark is None or mark != self._seen:
            found = GeneratorState(self._generator, _read(self._generator))
            if state is None or found.digest != state.digest:
                state = found
            self._remember(state)
        return state

    def restore(self, state: GeneratorState) -> None:
        """Put the generator back, and back to where it stood."""
        if self._holder is not None:
            generator = self._present() if state.generator is None else state.generator
            if self._holder.get(self._key) is not generator:
                self._holder[self._key] = generator
            self._bind(generator)
        if state is not self._state or self._seen is None or self._mark() != self._seen:
            _write(self._generator, state.values)
            self._remember(state)

    def adopt(self, state: GeneratorState) -> None:
        """Know a state from another process again, if the generator stands there."""
        if self.capture().digest == state.digest:
            self._remember(state)

    def _present(self) -> Any:
        if self._holder is None:
            return self._generator
        present = self._holder.get(self._key)
        return present if isinstance(present, _KINDS) else self._generator

    def _bind(self, generator: Any) -> None:
        if generator is not self._generator:
            self._generator, self._mark, self._state = generator, _mark_of(generator), None

    def _remember(self, state: GeneratorState) -> None:
        # numpy's keeps a second normal number, which it gives without moving.
        has_spare = isinstance(state.values, dict) and state.values.get("has_gauss")
        self._state, self._seen = state, None if has_spare else self._mark()


def generator_places(roots: Iterable[object]) -> list[GeneratorPlace]:
    """The generators that attributes lead to, through containers, objects and modules.

    Of a function they are those that it names. torch's default one is none of them.
    """
    known = {id(_PYTHONS), id(_NUMPYS), id(torch.default_generator)}
    return [GeneratorPlace(*place) for place in _found(roots, known)]


def described(generator: Any) -> dict[str, Any] | None:
    """A generator in numbers, bytes, arrays and tensors; None for what is none of a known class."""
    bits = getattr(generator, "bit_generator", None)
    name = type(generator if bits is None else bits).__name__
    if not isinstance(generator, _KINDS):
        return None
    if type(_new(name, bits is not None)) is not type(generator):
        return None
    device = str(getattr(generator, "device", ""))
    values = _read(generator)
    return {"name": name, "is_wrapped": bits is not None, "device": device, "values": values}


def from_description(found: dict[str, Any]) -> Any:
    """The generator that `described` was given."""
    made = _new(found["name"], found["is_wrapped"], found["device"])
    _write(made, found["values"])
    return made


def _new(name: str, is_wrapped: bool, device: str = "") -> Any:
    """A generator of a known class; None for a name that is none."""
    if is_wrapped or name in _BITS:
        bits = getattr(np.random, name)() if name in _BITS else None
        return np.random.Generator(bits) if is_wrapped and bits is not None else bits
    if name == "Generator":
        return torch.Generator(device or "cpu")
    known = {"Random": random.Random, "RandomState": np.random.RandomState}
    return known[name]() if name in known else None


_BITS = ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")
_Item = tuple[Any, dict[Any, Any] | None, Any]  # something, the dict that holds it, its key there


def _found(roots: Iterable[object], seen: set[int]) -> Iterator[_Item]:
    given = (values_named_in(root) if inspect.isfunction(root) else root for root in roots)
    left: list[_Item] = [(root, None, None) for root in given]
    for item, holder, key in left:  # grows
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, _KINDS):
            if not isinstance(item, random.SystemRandom):  # which has no state
                yield item, holder, key
        elif len(left) < _SEARCHED:
            left += _inside(item)


def _inside(item: Any) -> list[_Item]:
    """What attributes and containers hold, as far as it may lead to a generator."""
    found: Iterable[_Item] = ()
    if isinstance(item, list | tuple | deque):
        found = ((each, None, None) for each in item) if len(item) < _SEARCHED else ()
    elif isinstance(item, dict):
        found = ((each, item, key) for key, each in item.items()) if len(item) < _SEARCHED else ()
    elif isinstance(item, nn.Module):
        held = vars(item)
        passed = OF_EVERY_MODULE - {"_modules"}
        found = ((held[key], held, key) for key in held if key not in passed)
    else:
        held = getattr(item, "__dict__", {})
        own = [(each, None, None) for each in slots_of(item)]
        found = [*own, *((each, held, key) for key, each in held.items())]
    return [each for each in found if not isinstance(each[0], _PASSED)]


def _read(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        state = generator.getstate()
        if not _is_twister(generator):
            return state
        version, numbers, spare = state
        return version, array("I", numbers).tobytes(), spare
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    return getattr(generator, "bit_generator", generator).state


def _write(generator: Any, values: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(values)
    elif isinstance(generator, random.Random):
        if _is_twister(generator):
            version, numbers, spare = values
            values = version, tuple(array("I", numbers)), spare
        generator.setstate(values)
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(values)
    else:
        bits: Any = getattr(generator, "bit_generator", generator)
        bits.state = values


def _hashable(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return bytes_of(leaf)
    if isinstance(leaf, np.ndarray):
        return leaf.tobytes()
    leaf = leaf.item() if isinstance(leaf, np.generic) else leaf
    return leaf if isinstance(leaf, int | float | str | bytes) else repr(leaf)


def _is_twister(generator: random.Random) -> bool:
    return type(generator).getstate is random.Random.getstate


def _mark_of(generator: Any) -> Callable[[], object]:
    """Gives what changes wherever the generator moves, or None where that is not known."""
    if isinstance(generator, random.Random) and _is_twister(generator) and _python_is_known():
        position, words = _in_memory(id(generator) + object.__basicsize__, 0, 4)
        return lambda: (position.value, words.value, generator.gauss_next)  # type: ignore[attr-defined]
    bits = getattr(generator, "bit_generator", getattr(generator, "_bit_generator", generator))
    if not isinstance(bits, np.random.MT19937) or not _numpy_is_known():
        return lambda: None
    position, words = _in_memory(bits.ctypes.state_address, 4 * _WORDS, 0)
    # A global generator may be given other bits.
    owned = generator if hasattr(generator, "_bit_generator") else None
    return lambda: (
        (position.value, words.value) if owned is None or owned._bit_generator is bits else None
    )


def _in_memory(address: int, position: int, words: int) -> tuple[ctypes.c_int, ctypes.c_uint64]:
    """The position, and two of the words, which are all made anew where it starts over."""
    index = ctypes.c_int.from_address(address + position)
    # The first one is alike after every seeding.
    return index, ctypes.c_uint64.from_address(address + words + 4)


@cache
def _python_is_known() -> bool:
    """Whether CPython's twister lies behind the head of its object: its position, then words."""
    example, size = random.Random(1), 4 * (_WORDS + 1)
    if sys.implementation.name != "cpython" or _BASE.__basicsize__ < object.__basicsize__ + size:
        return False
    *words, position = example.getstate()[1]
    found = ctypes.string_at(id(example) + object.__basicsize__, size)
    return found == array("I", [position, *words]).tobytes()


_BASE = random.Random.__base__ or random.Random


@cache
def _numpy_is_known() -> bool:
    """Whether numpy's twister lies at its address: its words, then position."""
    example = np.random.MT19937(1)
    state: Any = example.state["state"]
    found = ctypes.string_at(example.ctypes.state_address, 4 * (_WORDS + 1))
    return found == array("I", [*state["key"].tolist(), int(state["pos"])]).tobytes()


GLOBAL_PLACES = (GeneratorPlace(_PYTHONS), GeneratorPlace(_NUMPYS))
