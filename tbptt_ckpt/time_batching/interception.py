"""Where a module's operations meet a region: torch's own functions, replaced while it is open.

NOTE [Replaced functions instead of a function mode]
A `TorchFunctionMode` sees every operation and every attribute of every tensor, at 0.8 us each.
A replaced function costs nothing to those that are not replaced, and 0.1 us to its own
callers; it does not see who imported `linear` by name, whose calls stay plain. The region is
looked up by thread: torch's functions are shared by all of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from tbptt_ckpt.time_batching.cells import CellWeights
from tbptt_ckpt.time_batching.region import Region, is_plain, is_stable

_lock = threading.Lock()
_open_regions = 0
_thread = threading.local()


def _region() -> Region | None:
    """This thread's region, unless a transform or mode wants to see plain operations."""
    region: Region | None = getattr(_thread, "region", None)
    if region is None:
        return None
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return None
    return None if torch._C._len_torch_function_stack() else region


_plain_linear = F.linear
_plain_forwards: dict[type[nn.RNNCellBase], Callable[..., Any]] = {
    cell: cell.forward for cell in (nn.LSTMCell, nn.GRUCell, nn.RNNCell)
}


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002
    region = _region()
    output = None if region is None else region.linear(input, weight, bias)
    return _plain_linear(input, weight, bias) if output is None else output


def _lstm_forward(cell: nn.LSTMCell, input: Tensor, hx: Any = None) -> Any:  # noqa: A002
    region = _region()
    if region is not None and type(hx) is tuple and len(hx) == 2:
        result = _call_cell(region, cell, "LSTMCell", input, hx)
        if result is not None:
            return result
    return _plain_forwards[nn.LSTMCell](cell, input, hx)


def _gru_forward(cell: nn.GRUCell, input: Tensor, hx: Any = None) -> Any:  # noqa: A002
    region = _region()
    result = None if region is None else _call_cell(region, cell, "GRUCell", input, (hx,))
    return _plain_forwards[nn.GRUCell](cell, input, hx) if result is None else result


def _rnn_forward(cell: nn.RNNCell, input: Tensor, hx: Any = None) -> Any:  # noqa: A002
    region = _region()
    if region is not None and cell.nonlinearity in ("tanh", "relu"):
        result = _call_cell(region, cell, f"RNNCell {cell.nonlinearity}", input, (hx,))
        if result is not None:
            return result
    return _plain_forwards[nn.RNNCell](cell, input, hx)


def _call_cell(
    region: Region, cell: nn.RNNCellBase, kind: str, x: Any, states: tuple[Any, ...]
) -> Any:
    parameters = cell._parameters
    if "weight_ih" not in parameters or "weight_hh" not in parameters:
        region.tally.left(kind, "a weight that is computed in the step")
        return None
    weights = CellWeights(
        parameters["weight_ih"],  # type: ignore[arg-type]
        parameters["weight_hh"],  # type: ignore[arg-type]
        parameters.get("bias_ih"),
        parameters.get("bias_hh"),
    )
    if not all(weight is None or is_stable(weight) for weight in weights):
        region.tally.left(kind, "a weight that is computed in the step")
        return None
    if not _fits(x, states, weights):
        region.tally.left(kind, "no batch of lanes, or dtypes or shapes that differ")
        return None
    return region.cells.call(kind, x, states, weights)


def _fits(x: Any, states: tuple[Any, ...], weights: CellWeights) -> bool:
    """Whether all is as the cells here want it; what does not fit is the plain cell's to judge."""
    hidden = weights.hidden
    dtype, width = hidden.dtype, hidden.shape[1]
    if not is_plain(x) or x.dim() != 2 or x.dtype != dtype or x.shape[1] != weights.input.shape[1]:
        return False
    if torch.is_autocast_enabled(x.device.type) or x.device.type != "cpu":
        return False
    if (weights.input_bias is None) != (weights.hidden_bias is None):
        return False
    shape = (x.shape[0], width)
    return all(is_plain(s) and s.dtype == dtype and s.shape == shape for s in states)


@contextmanager
def opened(region: Region) -> Iterator[None]:
    """While entered, this thread's operations meet the region."""
    before = getattr(_thread, "region", None)
    _change_open_regions(+1)
    _thread.region = region
    try:
        yield
    finally:
        _thread.region = before
        _change_open_regions(-1)
        region.close()


def _change_open_regions(change: int) -> None:
    global _open_regions
    with _lock:
        if _open_regions == 0:
            _install(
                _linear,
                {nn.LSTMCell: _lstm_forward, nn.GRUCell: _gru_forward, nn.RNNCell: _rnn_forward},
            )
        _open_regions += change
        if _open_regions == 0:
            _install(_plain_linear, _plain_forwards)


def _install(linear: Callable[..., Any], forwards: Any) -> None:
    F.linear = linear
    for cell, forward in forwards.items():
        cell.forward = forward
