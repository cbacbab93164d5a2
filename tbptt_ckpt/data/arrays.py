"""Sequences in numpy arrays and in memory-mapped files, read window by window."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from tbptt_ckpt.arguments import AnyPath, Dimension, checked
from tbptt_ckpt.data.source import check_mapped, check_range, check_same_source
from tbptt_ckpt.errors import ArgumentError, shown
from tbptt_ckpt.memory.available import Device
from tbptt_ckpt.module.host import sent

Array = NDArray[Any]


class ArraySequence:
    """A numpy array with time first; a read copies the steps it returns and no others.

    A memory-mapped array (see `map_file`) so stays on disk, however long it is. For arrays
    in memory whose windows need no copy and no other dtype, `TensorSequence` is cheaper.

    Args:
        inputs: [T, ...], or [T + 1, ...] with `next_step`.
        targets: [T, ...]; None where no step has a target.
        next_step: The target of a step is the input of the step after it.
        dtype: Of the inputs that are read; as in the array by default.
        target_dtype: Of the targets; by default `dtype` with `next_step`, else as in the array.
        device: Where `read` puts its tensors.

    Raises:
        ArgumentError: Arrays of other lengths, or too short for one step.
    """

    time_dim = 0

    @checked
    def __init__(
        self,
        inputs: Any,
        targets: Any = None,
        *,
        next_step: bool = False,
        dtype: torch.dtype | None = None,
        target_dtype: torch.dtype | None = None,
        device: Device = "cpu",
    ) -> None:
        _check_array("inputs", inputs)
        if targets is not None:
            _check_array("targets", targets)
            if next_step:
                raise ArgumentError(
                    "next_step=True takes the targets from the inputs; omit targets"
                )
            if len(targets) != len(inputs):
                raise ArgumentError(f"targets have {len(targets)} steps, inputs have {len(inputs)}")
        self._inputs, self._targets, self._next_step = inputs, targets, next_step
        self._num_steps = len(inputs) - 1 if next_step else len(inputs)
        if self._num_steps < 1:
            raise ArgumentError(
                f"inputs of shape {inputs.shape} are too short; next_step={next_step} needs "
                f"{2 if next_step else 1} rows at least"
            )
        self._dtype = dtype
        self._target_dtype = dtype if next_step and target_dtype is None else target_dtype
        self._device = torch.device(device)

    def __len__(self) -> int:
        return self._num_steps

    def __repr__(self) -> str:
        parts = [f"{self._num_steps:,} steps of {self._inputs.dtype} {list(self._inputs.shape)}"]
        if self._next_step:
            parts.append("targets the next step")
        elif self._targets is not None:
            parts.append(f"targets {self._targets.dtype} {list(self._targets.shape)}")
        return f"ArraySequence({', '.join(parts)})"

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Copies of the steps `[start, stop)`."""
        check_range(start, stop, self._num_steps)
        if self._next_step:
            rows = _owned(self._inputs[start : stop + 1])
            return self._moved(rows[:-1], self._dtype), self._moved(rows[1:], self._target_dtype)
        inputs = self._moved(_owned(self._inputs[start:stop]), self._dtype)
        if self._targets is None:
            return inputs, None
        return inputs, self._moved(_owned(self._targets[start:stop]), self._target_dtype)

    def state_dict(self) -> dict[str, Any]:
        """What identifies the sequence; a read depends on its arguments alone."""
        return {"num_steps": self._num_steps, "next_step": self._next_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Accept what `state_dict` of an equal sequence returned.

        Raises:
            ArgumentError: The sequence is not the same.
        """
        check_same_source(state, self.state_dict())

    def _moved(self, rows: Tensor, dtype: torch.dtype | None) -> Tensor:
        return sent(rows.to(dtype or rows.dtype), self._device)


@checked
def map_file(
    path: AnyPath,
    dtype: DTypeLike | None = None,
    *,
    step_shape: tuple[Dimension, ...] = (),
    offset: Dimension = 0,
) -> Array:
    """A file as a read-only array [T, ...] that stays on disk.

    Args:
        path: A `.npy` file, or a raw file of numbers.
        dtype: Of the numbers in a raw file, such as "uint16" or ">f4"; None for `.npy` files.
        step_shape: Shape of one step in a raw file.
        offset: Bytes of a header that a raw file begins with.

    Raises:
        ArgumentError: A file that does not exist, is empty, cannot be mapped, or does not
            hold whole steps.
    """
    path = Path(path)
    if not path.exists():
        raise ArgumentError(f"{path} does not exist")
    if not path.is_file():
        raise ArgumentError(f"{path} is not a regular file, so it cannot be memory-mapped")
    num_bytes = path.stat().st_size
    if num_bytes == 0:
        raise ArgumentError(f"{path} is empty")
    try:
        if dtype is not None:
            return _mapped_raw(path, num_bytes, _number_type(dtype), step_shape, offset)
        if offset or step_shape:
            raise ArgumentError(
                f"offset={offset} and step_shape={step_shape} are of raw files, whose dtype must "
                "be given; a .npy file says by itself what is in it"
            )
        return _mapped_npy(path)
    except OSError as error:
        raise ArgumentError(f"{path} cannot be read: {error.strerror or error}") from error


def _number_type(dtype: DTypeLike) -> np.dtype[Any]:
    try:
        return np.dtype(dtype)
    except Exception as error:  # whatever numpy makes of it
        raise ArgumentError(
            f"dtype={shown(dtype)} must be a type of numpy's, such as 'uint16' or '>f4', or None"
        ) from error


def _mapped_npy(path: Path) -> Array:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ArgumentError(
            f"{path} is not a .npy file of numbers ({error}); for a raw file pass dtype"
        ) from error
    if not isinstance(array, np.ndarray):
        raise ArgumentError(f"{path} is an archive of several arrays; save one array with np.save")
    return array


def _mapped_raw(
    path: Path, num_bytes: int, dtype: np.dtype[Any], step_shape: tuple[int, ...], offset: int
) -> Array:
    step_bytes = dtype.itemsize * math.prod(step_shape)
    if dtype.hasobject or step_bytes < 1:
        raise ArgumentError(
            f"dtype={dtype} and step_shape={step_shape} do not describe numbers in a file"
        )
    num_steps, rest = divmod(num_bytes - offset, step_bytes)
    if rest or num_steps < 1:
        raise ArgumentError(
            f"{path} has {num_bytes} bytes, of which those from offset={offset} on are no multiple "
            f"of the {step_bytes} bytes of a step of shape {step_shape} and dtype {dtype}"
        )
    shape = num_steps, *step_shape
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)


def _check_array(name: str, array: object) -> None:
    what = type(array).__name__
    if isinstance(array, np.ndarray):
        what = f"{array.dtype} array of shape {array.shape}"
    if not isinstance(array, np.ndarray) or array.ndim == 0 or array.dtype.kind not in "biufc":
        raise ArgumentError(f"{name} is a {what}; pass a numpy array of numbers with time first")


def _owned(rows: Array) -> Tensor:
    """A copy in the machine's byte order; a view would tie a tensor to the whole map."""
    check_mapped(rows)
    return torch.from_numpy(np.array(rows, dtype=rows.dtype.newbyteorder("="), order="C"))
