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
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from tbptt_ckpt.time_batching.operations import Bilinear, Convolution
from tbptt_ckpt.time_batching.region import Region

# Positions of a convolution's input, over all lanes, up to which "auto" considers it: with more
# of them a step's weight gradient is a large product already.
_MOST_POSITIONS = 512

_lock = threading.Lock()
_open_regions = 0
_thread = threading.local()


def _region() -> Region | None:
    """This thread's region, unless a transform or mode wants to see plain operations."""
    if torch.compiler.is_compiling():  # what is compiled outlives the region
        return None
    region: Region | None = getattr(_thread, "region", None)
    if region is None:
        return None
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return None
    return None if torch._C._len_torch_function_stack() else region


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002
    region = _region()
    output = None if region is None else region.linear(input, weight, bias)
    return _plain[F, "linear"](input, weight, bias) if output is None else output


def _zeros(cell: nn.RNNCellBase, x: Tensor) -> Tensor | None:
    """The state with which a cell begins by itself; None where it must judge its input first."""
    if not isinstance(x, Tensor) or x.dim() != 2:
        return None
    return x.new_zeros(x.shape[0], cell.hidden_size)


def _lstm_forward(cell: nn.LSTMCell, input: Tensor, hx: Any = None) -> Any:  # noqa: A002
    region, result = _region(), None
    states = (_zeros(cell, input),) * 2 if region is not None and hx is None else hx
    if region is not None and type(states) is tuple and len(states) == 2:
        result = region.cells.call(cell, "LSTMCell", input, states)
    return _plain[nn.LSTMCell, "forward"](cell, input, hx) if result is None else result


def _gru_forward(cell: nn.GRUCell, input: Tensor, hx: Any = None) -> Any:  # noqa: A002
    region, result = _region(), None
    if region is not None:
        h = _zeros(cell, input) if hx is None else hx
        result = region.cells.call(cell, "GRUCell", input, (h,))
    return _plain[nn.GRUCell, "forward"](cell, input, hx) if result is None else result


def _rnn_forward(cell: nn.RNNCell, input: Tensor, hx: Any = None) -> Any:  # noqa: A002
    region, result = _region(), None
    if region is not None and cell.nonlinearity in ("tanh", "relu"):
        h = _zeros(cell, input) if hx is None else hx
        result = region.cells.call(cell, f"RNNCell {cell.nonlinearity}", input, (h,))
    return _plain[nn.RNNCell, "forward"](cell, input, hx) if result is None else result


def _product(owner: Any, name: str) -> Callable[..., Any]:
    """`torch.matmul`, `torch.mm`, or a method of tensors that is one of them."""

    def multiply(*args: Any, **kwargs: Any) -> Any:
        region = None if kwargs or len(args) != 2 else _region()
        output = None if region is None else region.product(*args)
        return _plain[owner, name](*args, **kwargs) if output is None else output

    return multiply


def _addmm(*args: Any, **kwargs: Any) -> Any:
    region = None if kwargs or len(args) != 3 else _region()
    output = None
    if region is not None and isinstance(args[0], Tensor) and args[0].dim() == 1:
        bias, x, weight = args
        output = region.product(x, weight, bias)
    return _plain[torch, "addmm"](*args, **kwargs) if output is None else output


def _embedding(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    region = None if max_norm is not None or scale_grad_by_freq or sparse else _region()
    if region is not None and (padding_idx is None or -len(weight) <= padding_idx < len(weight)):
        row = -1 if padding_idx is None else padding_idx % len(weight)
        output = region.embedding(input, weight, row)
        if output is not None:
            return output
    result: Tensor = _plain[F, "embedding"](
        input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse
    )
    return result


def _bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    region = _region()
    output = None
    if region is not None and input1.dim() == input2.dim() == 2:
        output = region.recorded("bilinear", Bilinear, (input1, input2), weight, bias)
    return _plain[F, "bilinear"](input1, input2, weight, bias) if output is None else output


def _convolution(dims: int) -> Callable[..., Any]:
    """`F.conv1d` or `F.conv2d`."""

    def convolve(
        input: Tensor,  # noqa: A002
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        region, output = _region(), None
        if region is not None and (input.dim() != dims + 2 or isinstance(padding, str)):
            region = None
        if region is not None and region.chooses and _positions(input) > _MOST_POSITIONS:
            region = None
        if region is not None:
            sizes = [_each(size, dims) for size in (stride, padding, dilation)]
            make = partial(
                Convolution, stride=sizes[0], padding=sizes[1], dilation=sizes[2], groups=groups
            )
            options = (*sizes, groups)
            output = region.recorded(f"conv{dims}d", make, (input,), weight, bias, *options)
        if output is not None:
            return output
        plain = _plain[F, f"conv{dims}d"]
        return plain(input, weight, bias, stride, padding, dilation, groups)

    return convolve


def _positions(x: Tensor) -> int:
    return x.numel() // max(x.shape[1], 1)


def _each(size: Any, dims: int) -> tuple[int, ...]:
    return (size,) * dims if isinstance(size, int) else tuple(size) * (dims // len(size))


_replacements: dict[tuple[Any, str], Callable[..., Any]] = {
    (F, "linear"): _linear,
    (F, "embedding"): _embedding,
    (F, "bilinear"): _bilinear,
    (F, "conv1d"): _convolution(1),
    (F, "conv2d"): _convolution(2),
    (torch, "matmul"): _product(torch, "matmul"),
    (torch, "mm"): _product(torch, "mm"),
    (torch, "addmm"): _addmm,
    (Tensor, "__matmul__"): _product(Tensor, "__matmul__"),
    (Tensor, "matmul"): _product(Tensor, "matmul"),
    (Tensor, "mm"): _product(Tensor, "mm"),
    (nn.LSTMCell, "forward"): _lstm_forward,
    (nn.GRUCell, "forward"): _gru_forward,
    (nn.RNNCell, "forward"): _rnn_forward,
}
_plain: dict[tuple[Any, str], Callable[..., Any]] = {
    (owner, name): getattr(owner, name) for owner, name in _replacements
}


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
    global _open_regions  # one count for the process: torch's functions are shared by its threads
    with _lock:
        if _open_regions == 0:
            _install(_replacements)
        _open_regions += change
        if _open_regions == 0:
            _install(_plain)


def _install(functions: dict[tuple[Any, str], Callable[..., Any]]) -> None:
    for (owner, name), function in functions.items():
        setattr(owner, name, function)
