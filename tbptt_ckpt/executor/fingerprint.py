"""Fingerprints of states: equal where every bit is, and near where only rounding differs.

NOTE [Two kinds]
Bits are summed up in one number per tensor; of a state that is only the same to rounding a sketch
is made besides, `_PROJECTIONS` random projections per tensor, whose differences are as large, in
the mean of squares, as those of the states themselves. Neither keeps a state alive. On a device
both stay there until all of a window are read at once.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tbptt_ckpt.module.trees import (
    Tree,
    checksum,
    is_differentiable,
    iterate_leaves,
    structure,
    tensors_of,
)

_PROJECTIONS = 4
# Relative differences that rounding explains, at the end of a leaf and after one step; the second
# holds for products in TF32 too.
_NEAR = {torch.float64: (1e-9, 1e-9), torch.float32: (1e-4, 1e-2)}
_NEAR_IN_HALF = (3e-2, 1e-1)


@dataclass(frozen=True, slots=True, eq=False)
class Fingerprint:
    """What is kept of a state."""

    bits: list[Any]  # one number per tensor
    sketch: list[Any]  # projections per tensor; empty where bits are promised
    near: list[float]  # per tensor, how far apart rounding may bring two of them
    rest: object  # what else the state consists of

    @property
    def is_on_host(self) -> bool:
        """Whether its numbers can be looked at without waiting for a device."""
        return not any(isinstance(number, Tensor) for number in self.bits)

    def equals(self, other: Fingerprint) -> bool:
        """Whether all bits are equal."""
        return self.rest == other.rest and self.bits == other.bits

    def is_near(self, other: Fingerprint) -> bool:
        """Whether the states are equal, or apart by what rounding explains."""
        if self.rest != other.rest or len(self.sketch) != len(other.sketch):
            return False
        columns = zip(self.bits, other.bits, self.sketch, other.sketch, self.near, strict=False)
        known = [mine == its or _near(a, b, tol) for mine, its, a, b, tol in columns]
        return self.equals(other) or (bool(self.sketch) and all(known))


def _near(mine: Sequence[float], its: Sequence[float], tolerance: float) -> bool:
    ours = [(a, b) for a, b in zip(mine, its, strict=True) if a == a or b == b]  # NaN equals NaN
    scale = max([abs(a) for pair in ours for a in pair], default=0.0)
    return bool(mine) and all(a == b or abs(a - b) <= tolerance * scale for a, b in ours)


def fingerprint(state: Tree, *, sketched: bool, in_half: bool) -> Fingerprint:
    """The fingerprint of a state, with a sketch where only rounding is promised.

    `in_half` says that its steps ran under autocast.
    """
    tensors = [t.detach() for t in tensors_of(state)]
    bits = [_bits(t) for t in tensors]
    sketched = sketched or any(isinstance(number, Tensor) for number in bits)
    sketch = [_sketch(t) for t in tensors] if sketched else []
    near = [_tolerances(t, in_half)[0] for t in tensors]
    return Fingerprint(bits, sketch, near, _rest(state, len(tensors)))


def read(prints: Sequence[Fingerprint]) -> list[Fingerprint]:
    """The same with their numbers on the host; waits for a device once."""
    numbers = [n for p in prints for n in (*p.bits, *p.sketch) if isinstance(n, Tensor)]
    by_device = torch.cat([n.double().flatten() for n in numbers]).tolist() if numbers else []
    values = iter(by_device)

    def take(number: Any) -> Any:
        if not isinstance(number, Tensor):
            return number
        taken = [next(values) for _ in range(number.numel())]
        return taken if number.dim() else taken[0]

    return [
        Fingerprint([take(n) for n in p.bits], [take(n) for n in p.sketch], p.near, p.rest)
        for p in prints
    ]


def step_difference(state: Tree, other: Tree, *, in_half: bool) -> tuple[float, bool]:
    """The largest relative difference of two states' tensors, and whether rounding explains it."""
    largest, is_rounding = 0.0, True
    pairs = list(zip(tensors_of(state), tensors_of(other), strict=True))
    whole = sum(_norm(a) ** 2 for a, _ in pairs) ** 0.5
    for mine, its in pairs:
        difference, size = _norm(mine, its), max(_norm(mine), _norm(its))
        if not difference or size == float("inf"):  # what is not finite is found elsewhere
            continue
        largest = max(largest, difference / size if size else 1.0)
        eps = torch.finfo(mine.dtype).eps if is_differentiable(mine) else 0.0
        allowed = max(_tolerances(mine, in_half)[1] * size, 100 * eps * whole)
        is_rounding = is_rounding and difference <= allowed
    return largest, is_rounding


def _norm(tensor: Tensor, other: Tensor | None = None) -> float:
    """The norm of a tensor, or of its difference from another; infinite for NaN."""
    kind = torch.complex128 if tensor.is_complex() else torch.float64
    values = tensor.detach().to("cpu", kind)
    if other is not None:
        its = other.detach().to("cpu", kind)
        values = torch.where((values == its) | (values.isnan() & its.isnan()), 0, values - its)
    norm = float(torch.linalg.vector_norm(values))
    return norm if norm == norm else float("inf")


def _tolerances(tensor: Tensor, in_half: bool) -> tuple[float, float]:
    if not is_differentiable(tensor):
        return 0.0, 0.0
    kind = tensor.dtype.to_real()
    return _NEAR_IN_HALF if in_half else _NEAR.get(kind, _NEAR_IN_HALF)


def _bits(tensor: Tensor) -> Any:
    """A number that changes with any bit: on a device their sum, which waits for nothing."""
    if tensor.layout is not torch.strided:
        return 0
    if tensor.device.type == "cpu":
        return checksum(tensor)
    words = tensor.resolve_conj().reshape(-1)
    wide = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(words.element_size(), torch.uint8)
    return words.view(wide).sum(dtype=torch.int64) % (1 << 52)


def _sketch(tensor: Tensor) -> Any:
    """Random projections of a tensor; nothing of one that is not of floating numbers."""
    if not is_differentiable(tensor) or tensor.layout is not torch.strided or not tensor.numel():
        return []
    values = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    values = values if values.dtype in _NEAR else values.float()
    flat = values.reshape(-1)
    width = math.isqrt(flat.numel() - 1) + 1  # directions as long as the state would cost as much
    height, left = divmod(flat.numel(), width)
    rows, columns = (_directions(n, flat.dtype, flat.device) for n in (height, width))
    with _full_precision(flat.device.type):
        projections = (flat[: height * width].view(height, width) @ columns).mul_(rows).sum(0)
        if left:
            projections = projections + flat[-left:] @ columns[:left]
    return projections.tolist() if flat.device.type == "cpu" else projections


def _full_precision(device_type: str) -> AbstractContextManager[Any]:
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


@lru_cache(maxsize=256)
def _directions(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random vectors, always the same, and drawn from nobody's generator."""
    source = torch.Generator().manual_seed(length)
    return torch.randn(length, _PROJECTIONS, generator=source, dtype=dtype).to(device)


def _rest(state: Tree, num_tensors: int) -> object:
    """What a state consists of besides its tensors."""
    if type(state) is tuple and len(state) == num_tensors:
        return num_tensors
    return structure(state), [_plain(leaf) for leaf in iterate_leaves(state)]


def _plain(leaf: object) -> object:
    if leaf is None or isinstance(leaf, str | bytes | int | float | complex):
        return leaf if leaf == leaf else "nan"
    array = getattr(leaf, "tobytes", None)
    return zlib.crc32(array()) if array is not None and not isinstance(leaf, Tensor) else None
