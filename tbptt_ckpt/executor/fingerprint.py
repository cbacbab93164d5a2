"""Fingerprints of states: equal where every bit is, and near where only rounding differs.

NOTE [Two kinds]
Where bits are promised they are summed up in one number per tensor. Of a state that is only the
same to rounding a sketch is made: `_PROJECTIONS` random projections per tensor, whose differences
are as large, in the mean of squares, as those of the states themselves. Neither keeps a state
alive. On a device both stay there until all of a window are read at once.
"""

from __future__ import annotations

import ctypes
import math
import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tbptt_ckpt.module.host import Number, Numbers
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
_NUMPYS: dict[torch.dtype, Any] = {torch.float64: np.float64, torch.float32: np.float32}
_SMALL = 1 << 16  # elements for whose products no library wakes its threads


@dataclass(frozen=True, slots=True, eq=False)
class Fingerprint:
    """What is kept of a state."""

    values: list[Any]  # per tensor: a number made of its bits, or its projections
    near: list[float]  # per tensor, how far apart rounding may bring two of them
    rest: object  # what else the state consists of

    @property
    def is_on_host(self) -> bool:
        """Whether it can be looked at without waiting for a device."""
        return not any(isinstance(value, Tensor) for value in self.values)

    def equals(self, other: Fingerprint) -> bool:
        """Whether all that is kept is equal; NaN equals NaN."""
        return self._agrees(other, [0.0] * len(self.values))

    def is_near(self, other: Fingerprint) -> bool:
        """Whether the states are equal, or apart by what rounding explains."""
        return self._agrees(other, self.near)

    def _agrees(self, other: Fingerprint, near: Sequence[float]) -> bool:
        if self.rest != other.rest or len(self.values) != len(other.values):
            return False
        return all(map(_near, self.values, other.values, near))


def _near(mine: Any, its: Any, tolerance: float) -> bool:
    if mine == its or not isinstance(mine, list):
        return bool(mine == its)
    allowed = tolerance * max([abs(number) for number in (*mine, *its) if number == number] or [0])
    pairs = zip(mine, its, strict=True)
    return all(abs(a - b) <= allowed or a == b or (a != a and b != b) for a, b in pairs)


def fingerprint(state: Tree, *, sketched: bool, in_half: bool) -> Fingerprint:
    """The fingerprint of a state, a sketch where only rounding is promised.

    `in_half` says that its steps ran under autocast.
    """
    tensors = tensors_of(state)
    if not sketched:
        return Fingerprint([_bits(t) for t in tensors], [0.0] * len(tensors), _rest(state, tensors))
    near = [_tolerances(t.dtype, in_half)[0] for t in tensors]
    return Fingerprint(_sketches(tensors), near, _rest(state, tensors))


def read(prints: Sequence[Fingerprint], numbers: Numbers | None = None) -> list[Fingerprint]:
    """The same with their numbers on the host, and with them all `numbers` asked for."""
    numbers = Numbers() if numbers is None else numbers
    asked = [[_asked(value, numbers) for value in p.values] for p in prints]
    return [
        replace(p, values=[number.value for number in values])
        for p, values in zip(prints, asked, strict=True)
    ]


def same(one: Tree, other: Tree) -> bool:
    """Whether two states are equal bit by bit."""
    mine, its = read([fingerprint(s, sketched=False, in_half=False) for s in (one, other)])
    return mine.equals(its)


def _asked(value: Any, numbers: Numbers) -> Number:
    return numbers.ask(value) if isinstance(value, Tensor) else Number(value)


def step_difference(
    state: Tree, other: Tree, *, in_half: bool, by_chance: bool = False
) -> tuple[float, bool]:
    """The largest relative difference of two states' tensors, and whether rounding explains it.

    Where runs differ `by_chance`, rounding is as large as in what a sum is of: a small tensor, such
    as an output near zero, may differ by as little of the whole.
    """
    largest, is_rounding = 0.0, True
    pairs = list(zip(tensors_of(state), tensors_of(other), strict=True))
    whole = sum(_norm(a) ** 2 for a, _ in pairs) ** 0.5
    for mine, its in pairs:
        difference, size = _norm(mine, its), max(_norm(mine), _norm(its))
        if not difference or size == float("inf"):  # what is not finite is found elsewhere
            continue
        largest = max(largest, difference / size if size else 1.0)
        eps = torch.finfo(mine.dtype).eps if is_differentiable(mine) else 0.0
        tolerance = _tolerances(mine.dtype, in_half)[1]
        allowed = max(tolerance * size, (tolerance if by_chance else 100 * eps) * whole)
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


@lru_cache
def _tolerances(dtype: torch.dtype, in_half: bool) -> tuple[float, float]:
    if not (dtype.is_floating_point or dtype.is_complex):
        return 0.0, 0.0
    return _NEAR_IN_HALF if in_half else _NEAR.get(dtype.to_real(), _NEAR_IN_HALF)


def _bits(tensor: Tensor) -> Any:
    """A number that changes with any bit: on a device their sum, which waits for nothing."""
    if tensor.layout is not torch.strided:
        return 0
    if tensor.device.type == "cpu":
        return checksum(tensor)
    words = tensor.detach().resolve_conj().resolve_neg().reshape(-1)
    wide = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(words.element_size(), torch.uint8)
    return words.view(wide).sum(dtype=torch.int64)


@np.errstate(invalid="ignore", over="ignore")
def _sketches(tensors: Sequence[Tensor]) -> list[Any]:
    return [_sketch(tensor) for tensor in tensors]


def _sketch(tensor: Tensor) -> Any:
    """Random projections of a tensor; the bits of one that is not of floating numbers."""
    if type(tensor) is not Tensor or tensor.layout is not torch.strided:
        return _bits(tensor)
    if (layout := _layout(tensor.dtype, tensor.device, tensor.numel())) is not None:
        whole = tensor if tensor.is_contiguous() else tensor.detach().contiguous()
        return layout.projections(whole.data_ptr())
    is_sketched = is_differentiable(tensor) and tensor.numel()
    return _projections(tensor.detach()) if is_sketched else _bits(tensor)


@dataclass(frozen=True, slots=True)
class _Layout:
    """Small contiguous tensors of one size and dtype on the CPU, projected where they lie.

    Between the large operations of a leaf whatever is called is cold: an operation of torch's
    takes some 40 us, one of numpy's 10.
    """

    memory: type[ctypes.Array[ctypes.c_char]]
    shape: tuple[int, int]
    dtype: Any
    rows: Any
    columns: Any
    left: int  # numbers that do not fill a row

    def projections(self, address: int) -> list[float]:
        memory: Any = self.memory.from_address(address)
        grid = np.ndarray(self.shape, self.dtype, memory)
        found = self.rows.dot(grid).dot(self.columns)
        if self.left:
            rest = np.ndarray((self.left,), self.dtype, memory, grid.nbytes)
            found += rest.dot(self.columns[: self.left])
        numbers: list[float] = found.tolist()
        return numbers


@lru_cache(maxsize=256)
def _layout(dtype: torch.dtype, device: torch.device, size: int) -> _Layout | None:
    """How tensors of such kind are projected in place, if they are."""
    if dtype not in _NUMPYS or device.type != "cpu" or not 0 < size <= _SMALL:
        return None
    rows, columns = (np.array(each.tolist(), _NUMPYS[dtype]) for each in _directions(size, dtype))
    height, width = _grid(size)
    memory = ctypes.c_char * (size * dtype.itemsize)
    return _Layout(memory, (height, width), _NUMPYS[dtype], rows, columns, size - height * width)


def _projections(tensor: Tensor) -> Any:
    values = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    values = values if values.dtype in _NEAR else values.float()
    flat = values.reshape(-1)
    height, width = _grid(len(flat))
    rows, columns = _directions(len(flat), flat.dtype, flat.device)
    left = len(flat) - height * width
    with _full_precision(flat.device.type):
        projections = rows @ flat[: height * width].view(height, width) @ columns
        if left:
            projections += flat[-left:] @ columns[:left]
    return projections.tolist() if flat.device.type == "cpu" else projections


@lru_cache(maxsize=256)
def _grid(size: int) -> tuple[int, int]:
    """Rows and columns for so many numbers, few of either and with few numbers left over.

    A direction as long as a state would take as much memory as the state.
    """
    root = math.isqrt(size)
    height = next((n for n in range(root, root // 4, -1) if size % n == 0), root)
    return height, size // height


def _full_precision(device_type: str) -> AbstractContextManager[Any]:
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


@lru_cache(maxsize=256)
def _directions(
    size: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """What rows and columns of a grid are multiplied by: always the same, and random.

    They are drawn from nobody's generator. No row's factor is near zero or equal to another's,
    so that what differs in one row, or is swapped between two, is seen.
    """
    height, width = _grid(size)
    source, kind = torch.Generator().manual_seed(size), torch.float64
    signs = torch.randint(0, 2, (height,), generator=source, device="cpu") * 2 - 1
    rows = signs * (0.5 + torch.rand(height, generator=source, dtype=kind, device="cpu"))
    columns = torch.randn(width, _PROJECTIONS, generator=source, dtype=kind, device="cpu")
    return rows.to(device, dtype), columns.to(device, dtype)


def _rest(state: Tree, tensors: Sequence[Tensor]) -> object:
    """What a state consists of besides its tensors."""
    if type(state) is tuple and len(state) == len(tensors):
        return len(tensors)
    return structure(state), [_plain(leaf) for leaf in iterate_leaves(state)]


def _plain(leaf: object) -> object:
    if leaf is None or isinstance(leaf, str | bytes | int | float | complex):
        return leaf if leaf == leaf else "nan"
    array = getattr(leaf, "tobytes", None)
    return zlib.crc32(array()) if array is not None and not isinstance(leaf, Tensor) else None
