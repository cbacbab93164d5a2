"""Buffers of modules through time: what they held at a step, and how to put it back.

NOTE [Buffers change without notice]
A tensor's version tells of every write but those of batch normalisation, whose kernels
update running statistics without raising it. Small buffers on the CPU are therefore
compared by value; on an accelerator, where comparing would wait for the device, the
running statistics of a layer in training mode are taken to have changed.

NOTE [Restoring must not write]
Autograd may have saved a buffer for a backward that is still to come. A restored value is
put in the module as another tensor; the tensor that stood there is kept aside, and comes
back with the value it holds.

NOTE [Buffers are told apart by their place]
What buffers hold is kept, and saved, in the order in which they are found. It is that of
registration, and does not depend on which of them are None at the time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from tbptt_ckpt.errors import ArgumentError, SnapshotError, shown
from tbptt_ckpt.module.tripwires import IN_THE_STATE, is_tripwire, tripwire

# Larger buffers are lookup tables rather than statistics: their versions are believed.
_COMPARED_BYTES = 1 << 20
# Longer containers hold data rather than modules.
_SEARCHED_ITEMS = 1000


class BufferValue:
    """What a buffer held at some step; it may be None, as one is that is set in a first step."""

    __slots__ = ("_holder", "values")

    def __init__(self, values: Tensor | None) -> None:
        self.values = values
        # Stood in the module, holds these values, and is not in the module now.
        self._holder: Tensor | None = None

    def set_aside(self, holder: Tensor | None) -> None:
        """Keep the tensor that stood in the module."""
        self._holder = holder

    def take_holder(self) -> Tensor | None:
        """A tensor to put into the module."""
        mine, self._holder = self._holder, None
        return self.values.clone() if mine is None and self.values is not None else mine


class Buffer:
    """One buffer of one module."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self._module, self._name = module, name
        self._tensor: Tensor | None = None  # held `_value` when last looked at
        self._version = 0
        self._value: BufferValue | None = None
        self._has_run = True
        self._shadows_state = False
        self.twins: list[Buffer] = []  # which began as the same tensor

    def present(self) -> Tensor | None:
        """The tensor that is in the module now."""
        buffers = self._module._buffers  # a scripted module's has no `get`
        return buffers[self._name] if self._name in buffers else None  # noqa: SIM401

    def check_fits(self, value: BufferValue) -> None:
        """Raise `SnapshotError` where a saved value can never have been this buffer's."""
        tensor, saved = self.present(), value.values
        if tensor is None or saved is None:  # set by a step, to what is not known here
            return
        if (saved.shape, saved.dtype) != (tensor.shape, tensor.dtype):
            raise SnapshotError(
                f"module buffer {self._name!r} held {shown(saved)} at a step, where this one holds "
                f"{shown(tensor)}"
            )

    def about_to_run(self) -> None:
        """The module may change the buffer from here on."""
        self._has_run = True

    def capture(self, state: Sequence[Tensor] = ()) -> BufferValue:
        """What the buffer holds; the same object as before where nothing changed."""
        value = self._value
        if value is None or not self._holds(value):
            tensor = self._detached(state)
            value = BufferValue(None if tensor is None else tensor.detach().clone())
            self._remember(value)
        self._has_run = False
        return value

    def restore(self, value: BufferValue) -> None:
        """Put a value back, as another tensor unless it is there."""
        known = self._value if self._value is not None and self._holds(self._value) else None
        if known is value:
            return
        tensor = self.present()
        for twin in self.twins:
            if tensor is not None and twin.present() is tensor:
                raise ArgumentError(
                    f"module buffers {self._name!r} and {twin._name!r} are one tensor, which a "
                    "step changes; register it once, and read it from there"
                )
        holder = value.take_holder()  # may find no memory: before anything changes
        if self._shadows_state and holder is not None:
            holder = tripwire(holder, f"buffer {self._name!r}")
        if known is not None:
            known.set_aside(self._tensor)
        self._module._buffers[self._name] = holder
        self._remember(value)

    def _detached(self, state: Sequence[Tensor]) -> Tensor | None:
        """The tensor that is there; in place of a shadow of the state a tripwire."""
        tensor = self.present()
        if tensor is None or not tensor.requires_grad or is_tripwire(tensor):
            return tensor
        memory = tensor.untyped_storage().data_ptr()
        if all(memory != each.untyped_storage().data_ptr() for each in state):
            raise ArgumentError(
                f"module buffer {self._name!r} carries an autograd graph from step to step; "
                f"{IN_THE_STATE}; other values must be detached"
            )
        self._shadows_state = True
        self._module._buffers[self._name] = tripwire(tensor, f"buffer {self._name!r}")
        return self.present()

    def _remember(self, value: BufferValue) -> None:
        self._tensor = self.present()
        self._version = 0 if self._tensor is None else self._tensor._version
        self._value, self._has_run = value, False

    def _holds(self, value: BufferValue) -> bool:
        tensor, values = self.present(), value.values
        if tensor is None or values is None or tensor is not self._tensor:
            return tensor is self._tensor
        if tensor._version != self._version:
            return False
        if not self._has_run:
            return True
        if tensor.device.type == "cpu" and tensor.nbytes <= _COMPARED_BYTES:
            return torch.equal(tensor, values) or (  # bitwise, but a NaN equals itself
                tensor.is_floating_point()
                and torch.allclose(tensor, values, rtol=0, atol=0, equal_nan=True)
            )
        name = getattr(self._module, "original_name", "")  # of a scripted module
        is_norm = isinstance(self._module, _NormBase) or "BatchNorm" in name
        return not (is_norm and self._module.training)


def find_buffers(roots: Iterable[object]) -> list[Buffer]:
    """The distinct buffers of all the modules among `roots`, those that are None included."""
    found = {
        (id(module), name): Buffer(module, name)
        for _, module in _modules_of(roots)
        for name in module._buffers.keys()  # noqa: SIM118 (a scripted module's is no dict)
    }
    first_of: dict[int, Buffer] = {}
    for buffer in found.values():
        tensor = buffer.present()
        first = buffer if tensor is None else first_of.setdefault(id(tensor), buffer)
        if first is not buffer:
            first.twins.append(buffer)
    return list(found.values())


class BufferCensus:
    """Tells whether modules have got buffers that they did not have.

    Between two large products a search takes as long as all else that happens there. It is
    made the 1st, 2nd, 4th, 8th, ... time; in between, the modules that are known are asked.
    """

    def __init__(self, roots: Iterable[object]) -> None:
        self._roots = list(roots)
        self._modules = [module for _, module in _modules_of(self._roots)]
        self._known, self._sizes = set(self._names()), self._present_sizes()
        self._times_asked = 0

    def new_buffers(self, *, searches: bool) -> list[str]:
        """Names of buffers that were not there when this was made, as far as it looks."""
        self._times_asked += 1
        searches = searches or self._times_asked & (self._times_asked - 1) == 0
        if not searches and self._present_sizes() == self._sizes:
            return []
        return [name for key, name in self._names().items() if key not in self._known]

    def _present_sizes(self) -> list[tuple[int, int]]:
        return [(len(module._buffers), len(module._modules)) for module in self._modules]

    def _names(self) -> dict[tuple[int, str], str]:
        """Names, full where torch has them, by their module's identity and name there."""
        return {
            (id(module), name): f"{path}.{name}" if path else name
            for path, module in _modules_of(self._roots)
            for name in module._buffers.keys()  # noqa: SIM118
        }


def _modules_of(roots: Iterable[object]) -> Iterator[tuple[str, nn.Module]]:
    """All modules in the order in which they are found, with their paths."""
    for root in roots:
        if isinstance(root, nn.Module):
            yield from root.named_modules()
            yield from (("", module) for module in _unregistered_modules(root))


def _unregistered_modules(root: nn.Module) -> list[nn.Module]:
    """Modules that only a plain list, tuple or dict among a module's attributes leads to."""
    registered = {id(module) for module in root.modules()}
    found: list[nn.Module] = []
    seen: set[int] = set()
    left: deque[Any] = deque([root])
    while left:
        item = left.popleft()
        if not isinstance(item, nn.Module | list | tuple | dict) or id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, nn.Module):
            if id(item) not in registered:
                found.append(item)
            left += vars(item).values()
        elif len(item) <= _SEARCHED_ITEMS:
            left += item.values() if isinstance(item, dict) else item
    return found
