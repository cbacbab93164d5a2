"""A device without the hardware: tensors that are not on the CPU, by all that can be asked of them.

They compute on the CPU, say that they are on `DEVICE`, refuse to meet tensors of the CPU, and
what would wait for a device is counted.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

sys.path.insert(0, str(Path(__file__).parent.parent))  # benchmarks are no part of the package

from benchmarks.waits import Waits
from tbptt_ckpt.module import host

DEVICE = torch.device("meta")  # the one that every build can differentiate on
_MOVES = (torch.ops.aten._to_copy, torch.ops.aten.copy_)
_ATEN = torch.ops.aten


class OnDevice(Tensor):
    """A tensor on the device."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> OnDevice:
        made: OnDevice = torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            dtype=values.dtype,
            device=DEVICE,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
        )
        return made

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __repr__(self) -> str:
        return f"OnDevice({self.values})"

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False  # it has values

    def data_ptr(self) -> int:
        return self.values.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        operation = func.overloadpacket
        if operation not in _MOVES:
            _check_one_device(func, args, given)
        to_host = (
            operation is _ATEN._to_copy and torch.device(given.get("device") or DEVICE) != DEVICE
        )
        if "device" in given:
            given = {**given, "device": torch.device("cpu")}
        inner_args = _inside(args)
        out = func(*inner_args, **{name: _inside(value) for name, value in given.items()})
        if to_host or (operation is _ATEN.copy_ and not isinstance(args[0], OnDevice)):
            return out
        if func._schema.is_mutable and isinstance(args[0], OnDevice) and out is inner_args[0]:
            return args[0]
        return OnDevice(out) if isinstance(out, Tensor) else tree_map_only(Tensor, OnDevice, out)


def _inside(given: Any) -> Any:
    """The values of tensors on the device, in lists and tuples as well."""
    if isinstance(given, OnDevice):
        return given.values
    return type(given)(map(_inside, given)) if isinstance(given, list | tuple) else given


class SimulatedWaits(Waits):
    """Makes tensors on the device, pins memory for it, and counts waits.

    Attributes:
        pinned: How many tensors were made in pinned memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pinned = 0
        self._pinned: WeakSet[Any] = WeakSet()
        known = torch.is_autocast_enabled
        self._replaced = (
            mock.patch.object(
                torch, "is_autocast_enabled", lambda kind="cpu": kind != DEVICE.type and known(kind)
            ),
            mock.patch.object(host, "_PINS", (DEVICE.type,)),
        )

    def __enter__(self) -> Any:
        for replaced in self._replaced:
            replaced.__enter__()
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        for replaced in self._replaced:
            replaced.__exit__(*raised)

    def is_pinned(self, tensor: Tensor) -> bool:
        return any(tensor is pinned for pinned in self._pinned)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        operation = func.overloadpacket
        if operation is _ATEN.is_pinned:
            return self.is_pinned(args[0])
        if operation is _ATEN._pin_memory:
            pinned = args[0].clone()
            self._pinned.add(pinned)
            return pinned
        if kwargs.get("pin_memory"):
            made: Tensor = func(*map(_inside, args), **{**kwargs, "pin_memory": False})
            self._pinned.add(made)
            self.pinned += 1
            return made
        asked = kwargs.get("device")
        is_made_there = asked is not None and torch.device(asked) == DEVICE
        if is_made_there and not any(isinstance(t, OnDevice) for t in tree_leaves(args)):
            out = func(
                *args,
                **{**kwargs, "device": torch.device("cpu"), "non_blocking": False}
                if operation is _ATEN._to_copy
                else {**kwargs, "device": torch.device("cpu")},
            )
            return OnDevice(out)
        return func(*args, **kwargs)


def on_device(given: Any) -> Any:
    """A module with its weights and buffers there, or a tree of tensors."""
    if not isinstance(given, nn.Module):
        return tree_map_only(Tensor, lambda t: OnDevice(t.detach().clone()), given)
    for part in given.modules():
        for name, weight in list(part._parameters.items()):
            if weight is not None:
                part._parameters[name] = nn.Parameter(
                    OnDevice(weight.detach().clone()), requires_grad=weight.requires_grad
                )
        for name, buffer in list(part._buffers.items()):
            part._buffers[name] = None if buffer is None else OnDevice(buffer.clone())
    return given


def on_host(tree: Any) -> Any:
    """The same tensors on the CPU."""
    return tree_map_only(OnDevice, lambda t: t.detach().values.clone(), tree)


def _check_one_device(func: Any, args: Any, kwargs: Any) -> None:
    """A number may lie elsewhere, and so may what a list holds: indices."""
    for given in (*args, *kwargs.values()):
        if isinstance(given, Tensor) and given.is_cpu and given.dim():
            raise RuntimeError(f"{func}: a tensor {tuple(given.shape)} is on the CPU")
