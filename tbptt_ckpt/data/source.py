"""What a sequence must offer, and checks that sources share."""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from tbptt_ckpt.arguments import checked_where_used
from tbptt_ckpt.data.blocks import few_rows
from tbptt_ckpt.errors import ArgumentError, shown
from tbptt_ckpt.module.recurrence import Recurrence
from tbptt_ckpt.module.trees import Tree, map_tensors, tensors_of


@runtime_checkable
class Source(Protocol):
    """What a sequence must offer.

    It may also have `__len__` (without it the length is unknown, and a read that returns
    fewer steps than asked marks the end), `time_dim` (where time is in what `read` returns, by
    default 0, or where an `nn.RNN/LSTM/GRU` has it), `weights(start, stop)` (a tensor [n] or
    [n, B], zero where a target is absent), `resets(start, stop)` (a bool tensor [n] or [n, B],
    true at the steps whose input is the first of a new sequence, or None), and
    `state_dict`/`load_state_dict`, whose state
    consists of numbers, strings, tensors and containers of them.

    With a length any range may be read, and again; without one, ranges are read in order.
    `weights` and `resets` return tensors of one kind, or None, for all ranges alike. A source
    with an order of its own may have `set_epoch(epoch)`, called before each pass over it.
    """

    def read(self, start: int, stop: int) -> tuple[Tree, Tree]:
        """Inputs and targets (or None) of the steps `[start, stop)`."""
        ...


# What is trained on.
Steps = Annotated[Source | Iterable[tuple[Any, Any]], checked_where_used]


def for_module(source: Any, recurrence: Recurrence) -> Any:
    """The source as one for that module, where it does not say where it has time."""
    return source.for_module(recurrence) if hasattr(type(source), "for_module") else source


def as_tensors(tree: Tree) -> Tree:
    """The tree with numpy arrays as tensors that share their memory."""
    if isinstance(tree, PackedSequence) or (isinstance(tree, Tensor) and tree.is_nested):
        raise ArgumentError(
            f"a {type(tree).__name__} of sequences of several lengths has no steps of one shape; "
            "use LaneSource([TensorSequence(x, y), ...], lanes), which runs them side by side"
        )
    return tree if isinstance(tree, Tensor) else map_tensors(_from_numpy, tree, np.ndarray)


def check_mapped(array: np.ndarray[Any, Any]) -> None:
    """Raise `ArgumentError` if an array's file was cut short since it was mapped.

    To touch what is missing would end the process. Where nothing is mapped, nothing is done.
    """
    whole: Any = array
    while isinstance(whole.base, np.ndarray):
        whole = whole.base
    if not isinstance(whole.base, mmap.mmap):
        return
    mapped = getattr(whole, "offset", 0) + whole.nbytes
    if whole.base.size() < mapped:  # of the file that is open, whatever has its name by now
        raise ArgumentError(
            f"{getattr(whole, 'filename', None) or 'a mapped file'} was cut short while it was "
            f"read: {mapped} bytes of it were mapped, and it has {whole.base.size()}; map it again "
            "when it is whole, and replace such a file by another one instead of writing into it"
        )


def _from_numpy(array: np.ndarray[Any, Any]) -> Tensor:
    check_mapped(array)
    with warnings.catch_warnings():  # read-only maps are fine: nothing writes to inputs
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        try:
            return torch.from_numpy(array)
        except (TypeError, ValueError) as error:  # texts, other byte orders, reversed arrays
            raise ArgumentError(
                f"a numpy array of dtype {array.dtype}, shape {array.shape} and strides "
                f"{array.strides} cannot be read as a tensor; convert or copy it ({error})"
            ) from error


def check_time_exists(name: str, tensor: Tensor, time_dim: int) -> None:
    """Raise `ArgumentError` unless a tensor has the dimension."""
    if time_dim >= tensor.dim():
        raise ArgumentError(
            f"time_dim={time_dim} does not exist in {name} of shape {tuple(tensor.shape)}"
        )


def checked_weight(weight: Tensor | None, num_steps: int) -> Tensor | None:
    """The weight of `num_steps` steps, [T] or [T, B], in float64 on the CPU."""
    if weight is None:
        return None
    weight = _checked_rows("weight", weight, num_steps).to(torch.float64)
    if not all(bool(((rows >= 0) & (rows < torch.inf)).all()) for rows in few_rows(weight)):
        raise ArgumentError("weight must be finite and not negative; zero means absent")
    return weight


def checked_resets(resets: Tensor | None, num_steps: int) -> Tensor | None:
    """Which of `num_steps` steps begin a new sequence, [T] or [T, B], as bools on the CPU."""
    if resets is None:
        return None
    resets = _checked_rows("resets", resets, num_steps)
    if resets.dtype != torch.bool:
        raise ArgumentError(
            f"resets of dtype {resets.dtype} must be torch.bool, true where a sequence begins"
        )
    return resets


def _checked_rows(name: str, rows: object, num_steps: int) -> Tensor:
    if not isinstance(rows, Tensor | np.ndarray | list):
        raise ArgumentError(f"{name}={shown(rows)} must be a tensor [{num_steps}] or with lanes")
    try:
        tensor = torch.as_tensor(rows, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"{name}={shown(rows)} cannot be read: {error}") from error
    if tensor.dim() not in (1, 2) or tensor.shape[0] != num_steps:
        raise ArgumentError(
            f"{name} of shape {tuple(tensor.shape)} must be [{num_steps}] or [{num_steps}, lanes]"
        )
    return tensor


def rows_of(source: object, method: str, start: int, stop: int) -> Tensor | None:
    """What a source's `weights` or `resets` say about some steps; None without that method."""
    rows: Callable[[int, int], Tensor | None] | None = getattr(source, method, None)
    return None if rows is None else rows(start, stop)


def check_range(start: int, stop: int, num_steps: int) -> None:
    """Raise `ArgumentError` unless the steps `[start, stop)` exist."""
    if not 0 <= start < stop <= num_steps:
        raise ArgumentError(f"steps [{start}, {stop}) are not in [0, {num_steps})")


def check_same_source(saved: object, present: object) -> None:
    """Raise `ArgumentError` unless a saved source was equal to this one."""
    if saved != present:
        raise ArgumentError(f"the saved source was {saved}, this one is {present}")


def described(tree: Tree) -> str:
    """What a tree holds, in few words: `float32 [13, 4]`, or how many tensors."""
    tensors = tensors_of(tree)
    if len(tensors) != 1:
        return f"{len(tensors)} tensors"
    return f"{str(tensors[0].dtype).removeprefix('torch.')} {list(tensors[0].shape)}"
