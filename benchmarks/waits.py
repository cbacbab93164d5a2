"""Counts what makes the host wait for a device, by the line of the package that asked.

On CUDA `torch.cuda.set_sync_debug_mode` sees more; this sees operations on any device, and tests
hold windows to it where there is none.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tbptt_ckpt

_PACKAGE = str(Path(tbptt_ckpt.__file__).parent)
_ATEN = torch.ops.aten
# What gives the host a number, or a tensor of a size that only the device knows.
_READS = frozenset(
    (
        _ATEN._local_scalar_dense,
        _ATEN._unique2,
        _ATEN.equal,
        _ATEN.is_nonzero,
        _ATEN.masked_select,
        _ATEN.nonzero,
        _ATEN.unique_consecutive,
        _ATEN.unique_dim,
    )
)
_INDEXES = frozenset((_ATEN.index, _ATEN.index_put, _ATEN.index_put_, _ATEN._unsafe_index))
_COPIES = frozenset((_ATEN._to_copy, _ATEN.copy_))


class Waits(TorchDispatchMode):
    """While entered, counts waits for devices.

    Attributes:
        found: How often each line of the package waited, as "room/file.py:line operation". What an
            optimizer or a scaler reads stands with the line that called it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """All of them."""
        return self.found.total()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Count an operation, and run it."""
        given = kwargs or {}
        if self.waits(func.overloadpacket, args, given):
            self.found[f"{_asking_line()} {func}"] += 1
        return self.run(func, args, given)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run it."""
        return func(*args, **kwargs)

    def waits(self, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the host waits."""
        if operation in _COPIES:
            return self._copy_waits(operation, args, kwargs)
        if operation in _READS:
            return any(is_on_device(t) for t in tree_leaves(args))
        if operation in _INDEXES and is_on_device(args[0]):
            indices = [index for index in args[1] if isinstance(index, Tensor)]
            return any(i.dtype in (torch.bool, torch.uint8) or i.is_cpu for i in indices)
        return False

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether a device copies from there while the host goes on."""
        return tensor.is_pinned()

    def _copy_waits(self, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if operation is _ATEN.copy_:
            target, source = args[0].device, args[1]
            is_blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
        else:
            source = args[0]
            target = torch.device(kwargs.get("device") or source.device)
            is_blocking = not kwargs.get("non_blocking")
        if target.type == source.device.type:
            return False
        return is_blocking or not self.is_pinned(source if source.is_cpu else args[0])


def is_on_device(value: object) -> bool:
    """Whether this is a tensor that is not on the host."""
    return isinstance(value, Tensor) and not value.is_cpu


def _asking_line() -> str:
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(_PACKAGE):
            return f"{path.removeprefix(_PACKAGE).lstrip('/')}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "outside"
