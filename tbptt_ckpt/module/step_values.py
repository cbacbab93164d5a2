"""What is known of the values in a step, and of the arguments of its calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Value:
    """What is known of a value in a step, whatever it holds.

    Attributes:
        shape: Of a tensor; None for what is none. Dimension 0 is that of the example.
        has_lanes: Dimension 0 is one row a lane, for any number of lanes, and no other depends
            on that number.
        is_constant: The same at every step: of weights and literals, or a dtype or device.
        items: Those of a tuple.
    """

    shape: tuple[int, ...] | None
    has_lanes: bool = False
    is_constant: bool = False
    items: tuple[Value, ...] = ()

    @property
    def rank(self) -> int:
        """How many dimensions it has."""
        return len(self.shape or ())


def known_value(first: Any, second: Any, is_constant: bool, lanes: int) -> Value:
    """What is known of a value that was made for so many lanes, and for one lane more."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        shape, other = tuple(first.shape), tuple(second.shape)
        rows = (shape[:1], other[:1])
        has_lanes = rows == ((lanes,), (lanes + 1,)) and shape[1:] == other[1:]
        return Value(shape, has_lanes and not is_constant, is_constant)
    if isinstance(first, tuple | list) and isinstance(second, tuple | list):
        items = [
            known_value(*pair, is_constant, lanes) for pair in zip(first, second, strict=False)
        ]
        return Value(None, False, is_constant, tuple(items))
    return Value(None, False, is_constant)


class Call:
    """Arguments of a call, where `Value`s stand for those that are computed."""

    def __init__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.args, self.kwargs = tuple(args), dict(kwargs)
        self.values = [*_values_in(self.args), *_values_in(self.kwargs)]
        self.first = self.get(0, "input", self.kwargs.get("self"))

    def get(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by its place or its name."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)

    @property
    def only_first(self) -> bool:
        """Whether the first argument is a tensor of lanes and everything else is literal."""
        return len(self.values) == 1 and isinstance(self.first, Value) and self.first.has_lanes

    def are_constant(self, *wanted: tuple[int, str]) -> bool:
        """Whether the arguments are constant or left out, and the first is all that has lanes."""
        rest = [self.get(*each) for each in wanted]
        known = [value for value in rest if isinstance(value, Value)]
        return (
            isinstance(self.first, Value)
            and self.first.has_lanes
            and len(self.values) == 1 + len(known)
            and all(value.is_constant for value in known)
        )


def _values_in(arguments: Any) -> list[Value]:
    if isinstance(arguments, Value):
        return [arguments]
    if isinstance(arguments, Mapping):
        return [value for each in arguments.values() for value in _values_in(each)]
    if isinstance(arguments, list | tuple):
        return [value for each in arguments for value in _values_in(each)]
    if isinstance(arguments, slice):
        return _values_in((arguments.start, arguments.stop, arguments.step))
    return []
