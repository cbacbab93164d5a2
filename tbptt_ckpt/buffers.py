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
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from tbptt_ckpt.errors import ArgumentError

# Larger buffers are lookup tables rather than statistics: their versions are believed.
_COMPARED_BYTES = 1 << 20


class BufferValue:
    """What a buffer held at some step.

    Attributes:
        values: A copy.
        holder: A tensor that stood in the module, holds these values, and is not in the
            module now.
    """

    __slots__ = ("holder", "values")

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.holder: Tensor | None = None


class Buffer:
    """One buffer of one module.

    Args:
        module: Its owner.
        name: Its name there.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self._module, self._name = module, name
        self._tensor: Tensor | None = None  # held `_value` when last looked at
        self._version = 0
        self._value: BufferValue | None = None
        self._has_run = True
        self.twins: list[Buffer] = []  # which began as the same tensor

    def present(self) -> Tensor | None:
        """The tensor that is in the module now."""
        return self._module._buffers[self._name]

    def about_to_run(self) -> None:
        """The module may change the buffer from here on."""
        self._has_run = True

    def capture(self) -> BufferValue:
        """What the buffer holds; the same object as before where nothing changed."""
        if self._value is None or not self._holds(self._value):
            self._remember(BufferValue(self._checked().detach().clone()))
        self._has_run = False
        assert self._value is not None
        return self._value

    def restore(self, value: BufferValue) -> None:
        """Put a value back, as another tensor unless it is there."""
        known = self._value if self._value is not None and self._holds(self._value) else None
        if known is value:
            return
        self._check_alone()
        if value.holder is None:
            value.holder = value.values.clone()  # may find no memory: before anything changes
        if known is not None:
            known.holder = self._tensor
        self._module._buffers[self._name] = value.holder
        value.holder = None
        self._remember(value)

    def _check_alone(self) -> None:
        for twin in self.twins:
            if twin.present() is self.present():
                raise ArgumentError(
                    f"module buffers {self._name!r} and {twin._name!r} are one tensor, which a "
                    "step changes; register it once, and read it from there"
                )

    def _checked(self) -> Tensor:
        tensor = self.present()
        if tensor is None or tensor.requires_grad:
            carried = "nothing" if tensor is None else "an autograd graph"
            raise ArgumentError(
                f"module buffer {self._name!r} carries {carried} from step to step; what passes "
                "with its gradient belongs in the state, other values must be detached"
            )
        return tensor

    def _remember(self, value: BufferValue) -> None:
        self._tensor = self._checked()
        self._version, self._value, self._has_run = self._tensor._version, value, False

    def _holds(self, value: BufferValue) -> bool:
        tensor = self.present()
        if tensor is None or tensor is not self._tensor or tensor._version != self._version:
            return False
        if not self._has_run:
            return True
        if tensor.device.type == "cpu" and tensor.nbytes <= _COMPARED_BYTES:
            return _same_values(tensor, value.values)
        return not (isinstance(self._module, _NormBase) and self._module.training)


def find_buffers(roots: Iterable[object]) -> list[Buffer]:
    """The distinct buffers of all the modules among `roots`."""
    found: dict[tuple[int, str], Buffer] = {}
    for root in roots:
        if isinstance(root, nn.Module):
            for module in root.modules():
                for name, tensor in module._buffers.items():
                    if tensor is not None:
                        found[id(module), name] = Buffer(module, name)
    first_of: dict[int, Buffer] = {}
    for buffer in found.values():
        first = first_of.setdefault(id(buffer.present()), buffer)
        if first is not buffer:
            first.twins.append(buffer)
    return list(found.values())


def _same_values(some: Tensor, other: Tensor) -> bool:
    """Bitwise equality as far as it matters: a NaN equals itself."""
    if torch.equal(some, other):
        return True
    return some.is_floating_point() and torch.allclose(
        some, other, rtol=0.0, atol=0.0, equal_nan=True
    )
