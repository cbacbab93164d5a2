"""Sketches of the weights' gradient as it accumulates: a few sums of it, cheap and linear.

NOTE [Why a sketch]
How much of a window's gradient is missing where the backward has come so far is the norm of a
difference between two gradients, and to hold one of them takes as much memory as the weights. Each
element is therefore added, with a random sign, to one of `BUCKETS` sums (Charikar, Chen &
Farach-Colton 2004, doi:10.1016/S0304-3975(03)00400-6). That is linear, so the difference of two
sketches is the sketch of the difference, and its norm is that of what was sketched within some 5 %.

NOTE [Where it lies]
Gradients are multiplied by the signs of one chunk, at most 256 KiB. Chunks have the same ones, and
are told apart by the bucket that they begin with. On the CPU gradients are read where they lie, and
nothing of it is a tensor; elsewhere a product with the signs takes at most what the gradient of the
largest weight does, as a leaf's backward did before. Gradients in units of an optimizer's steps are
made chunk by chunk, in the place of that product.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tbptt_ckpt.module.host import Number, Numbers, is_waited_for, sent
from tbptt_ckpt.updates.step_units import Unit

BUCKETS = 256
_CHUNK = BUCKETS * BUCKETS  # elements, with a sign each
_STEP = 37  # odd: as many chunks as there are buckets begin each with another one
_TOGETHER = 16  # chunks of one operation
_NUMPYS = (torch.float32, torch.float64)

Row = Any  # an array on the CPU, a tensor elsewhere; never changed


def can_sketch(weights: Sequence[Tensor]) -> bool:
    """Whether all weights are on one device."""
    return len({weight.device for weight in weights}) == 1


def sketch(weights: Sequence[Tensor], units: Sequence[Unit | None] | None = None) -> Row:
    """The sums of what is in `.grad`, in signed buckets: [BUCKETS]; no device is waited for.

    Gradients that are not dense count as none. With `units` each is taken in that of its weight.
    """
    row = _nothing(weights[0])
    chunk = 0
    for weight, unit in zip(weights, units or repeat(None), strict=False):
        if (gradient := weight.grad) is not None and _is_dense(gradient) and gradient.numel():
            flat = _flat(gradient)
            by = None if unit is None else Unit(_flat(unit.squares, gradient), unit.eps)
            is_array = _is_read_in_place(flat) and (by is None or _is_read_in_place(by.squares))
            row = row + (_of_array if is_array else _of_tensor)(flat, chunk, by)
        chunk += -(-_size(weight) // _CHUNK)
    return row


class Sketcher:
    """Sketches of the same weights' gradients, time after time: as they are, and in `units`.

    What small weights cost is calls. All of them that fill no more than a chunk are therefore laid
    in one array, each where its own buckets begin, and multiplied by signs that are divided by the
    units once: the sums are those of `sketch`.
    """

    def __init__(self, weights: Sequence[Tensor], units: Sequence[Unit | None] | None) -> None:
        self._weights, self._units = weights, units
        self._places, end = list[slice](), 0
        for chunk, weight in enumerate(weights):
            begin = end + _first_bucket(chunk)
            self._places.append(slice(begin, begin + weight.numel()))
            end = -(-self._places[-1].stop // BUCKETS) * BUCKETS
        squares = [unit.squares for unit in units or () if unit is not None]
        has_one_kind = len({weight.dtype for weight in weights}) == 1
        is_small = end <= _CHUNK and has_one_kind and all(map(_lies_flat, (*weights, *squares)))
        self._factors = self._signs_by_units(end) if is_small else None

    def rows(self) -> list[Row]:
        """What is in `.grad`: one sketch, and another in units if there are any."""
        grads = [weight.grad for weight in self._weights]
        known = [None if grad is None or not _is_dense(grad) else grad for grad in grads]
        if self._factors is None or not all(grad is None or _lies_flat(grad) for grad in known):
            every = (None,) if self._units is None else (None, self._units)
            return [sketch(self._weights, units) for units in every]
        values = np.zeros(self._factors.shape[1:], self._factors.dtype)
        for grad, place in zip(known, self._places, strict=True):
            if grad is not None:
                values.reshape(-1)[place] = _array(grad.detach().view(-1))
        with np.errstate(all="ignore"):  # of gradients that are not finite
            return list(np.einsum("ij,kij->kj", values, self._factors).astype(np.float64))

    def _signs_by_units(self, end: int) -> Any:
        kind = _array(self._weights[0].detach().view(-1)).dtype
        units = [[None] * len(self._weights), *([] if self._units is None else [self._units])]
        found = np.zeros((len(units), end), kind)
        for row, of_weights in zip(found, units, strict=True):
            for place, unit in zip(self._places, of_weights, strict=True):
                row[place] = _signs(kind).reshape(-1)[: place.stop - place.start]
                if unit is not None:
                    row[place] /= np.sqrt(_array(unit.squares.view(-1))) + unit.eps
        return found.reshape(len(units), -1, BUCKETS)


def tail_norms(rows: Sequence[Row]) -> Any:
    """The norms of what came after each of several sketches, by the last one: [rows]."""
    if isinstance(rows[-1], Tensor):
        stacked = torch.stack(list(rows))
        return torch.linalg.vector_norm(stacked[-1] - stacked, dim=1)
    arrays = np.stack(rows)
    with np.errstate(all="ignore"):  # of gradients that are not finite, which others tell of
        return np.linalg.norm(arrays[-1] - arrays, axis=1)


def norm_of(tensors: Sequence[Tensor]) -> Any:
    """The norm of tensors together: a number, or a tensor elsewhere."""
    flats = [_flat(tensor) for tensor in tensors]
    if all(map(_is_read_in_place, flats)):
        arrays = [_array(flat) for flat in flats]
        return float(sum(np.dot(array, array) for array in arrays)) ** 0.5
    norms = [torch.linalg.vector_norm(flat.to(_wide(flat))) for flat in flats]
    return torch.linalg.vector_norm(torch.stack(norms))


def asked(value: Any, numbers: Numbers) -> Number:
    """Rows, or numbers made of them, as the host reads them: at once where they are its own."""
    if isinstance(value, Tensor):
        return numbers.ask(value)
    return Number(value.tolist() if isinstance(value, np.ndarray) else value)


def signs_for(weights: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that sketches of such weights' gradients need, and keep; none on the CPU."""
    found = [_signs_of(weight) for weight in weights if is_waited_for(weight)]
    return list({id(signs): signs for signs in found}.values())


def _of_array(flat: Tensor, chunk: int, unit: Unit | None) -> Row:
    values = _array(flat)
    squares = None if unit is None else _array(unit.squares)
    row: Row = np.zeros(BUCKETS)
    for begin in range(0, len(values), _CHUNK):
        part = values[begin : begin + _CHUNK]
        if unit is not None and squares is not None:
            with np.errstate(all="ignore"):  # of gradients that are not finite
                part = part / (np.sqrt(squares[begin : begin + _CHUNK]) + unit.eps)
        height, left = divmod(len(part), BUCKETS)
        signs = _signs(values.dtype)
        grid = part[: height * BUCKETS].reshape(height, BUCKETS)
        sums = np.einsum("ij,ij->j", grid, signs[:height])
        if left:
            sums[:left] += part[-left:] * signs[height, :left]
        row += np.roll(sums, _first_bucket(chunk))
        chunk += 1
    return row


@torch.no_grad()
def _of_tensor(flat: Tensor, chunk: int, unit: Unit | None) -> Row:
    signs = _signs_of(flat)
    row: Row = torch.zeros(BUCKETS, dtype=signs.dtype, device=flat.device)
    whole = len(flat) // _CHUNK
    for begin in range(0, whole, _TOGETHER):
        end = min(begin + _TOGETHER, whole)
        signed = _signed(flat, unit, slice(begin * _CHUNK, end * _CHUNK), signs)
        sums = signed.view(end - begin, BUCKETS, BUCKETS).sum(1)
        for number, part in enumerate(sums, chunk + begin):
            row += part.roll(_first_bucket(number))
    signed = _signed(flat, unit, slice(whole * _CHUNK, None), signs)
    count, left = len(signed), len(signed) % BUCKETS
    sums = signed[: count - left].view(-1, BUCKETS).sum(0)
    sums[:left] += signed[count - left :]
    row += sums.roll(_first_bucket(chunk + whole))
    return row if is_waited_for(row) else row.numpy()


def _signed(flat: Tensor, unit: Unit | None, part: slice, signs: Tensor) -> Tensor:
    """The product of some chunks, or of less than one, with their signs: flat."""
    values = flat[part]
    size = min(len(values), _CHUNK) or 1
    if unit is None:
        return (values.view(-1, size) * signs[:size]).view(-1)
    made = unit.squares[part].to(signs.dtype, copy=True).sqrt_().add_(unit.eps)
    torch.div(values, made, out=made)
    return made.view(-1, size).mul_(signs[:size]).view(-1)


def _array(flat: Tensor) -> Any:
    """The numbers where they lie; `numpy()` would mark their memory as one that is not torch's."""
    return np.from_dlpack(flat)


def _first_bucket(chunk: int) -> int:
    return chunk * _STEP % BUCKETS


def _is_read_in_place(tensor: Tensor) -> bool:
    return not is_waited_for(tensor) and tensor.dtype in _NUMPYS


def _lies_flat(tensor: Tensor) -> bool:
    return _is_read_in_place(tensor) and tensor.is_contiguous()


def _is_dense(tensor: Tensor) -> bool:
    is_plain = is_waited_for(tensor) or type(tensor) is Tensor
    return is_plain and tensor.layout is torch.strided


def _wide(tensor: Tensor) -> torch.dtype:
    return tensor.dtype if tensor.dtype in _NUMPYS else torch.float32


def _flat(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """All elements as they lie, or as those of `like`: the same order in every look at them."""
    values = tensor.detach()
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj())
    strides = (values if like is None else like).stride()
    as_it_lies = values.permute(sorted(range(values.dim()), key=lambda dim: -strides[dim]))
    return as_it_lies.reshape(-1)  # a copy only of what has gaps


def _size(tensor: Tensor) -> int:
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def _nothing(tensor: Tensor) -> Row:
    if not is_waited_for(tensor):
        return np.zeros(BUCKETS)
    return torch.zeros(BUCKETS, dtype=_wide(tensor), device=tensor.device)


def _signs_of(tensor: Tensor) -> Tensor:
    return _signs_on(min(_size(tensor), _CHUNK), tensor.device, _wide(tensor))


@lru_cache(maxsize=2)
def _signs(dtype: Any) -> Any:
    """Of a chunk: [BUCKETS, BUCKETS]; always the same, and from nobody's generator."""
    source = np.random.Generator(np.random.PCG64(0))
    bits = source.integers(0, 2, (BUCKETS, BUCKETS), dtype=np.int8)
    return (2 * bits - 1).astype(dtype)


@lru_cache(maxsize=8)
def _signs_on(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    kind = np.float64 if dtype is torch.float64 else np.float32
    return sent(torch.from_numpy(_signs(np.dtype(kind)).reshape(-1)[:size]), device)
