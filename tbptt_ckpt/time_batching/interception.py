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
from types import BuiltinFunctionType, MethodDescriptorType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from tbptt_ckpt.module.replaced import Function, ReplacedFunctions
from tbptt_ckpt.time_batching.cell_kinds import GRU, LSTM, RNN
from tbptt_ckpt.time_batching.cells import Cell
from tbptt_ckpt.time_batching.operations import Bilinear, Convolution
from tbptt_ckpt.time_batching.region import Region

# Positions of a convolution's input, over all lanes, up to which "auto" considers it: with more
# of them a step's weight gradient is a large product already.
_MOST_POSITIONS = 512

_saved_tensor_hooks: Callable[[bool], Any] = torch._C._autograd._top_saved_tensors_default_hooks


class _Thread(threading.local):
    entered: tuple[Region, Any] | None = None  # with the hooks on saved tensors, as it was opened


_thread = _Thread()


@contextmanager
def opened(region: Region) -> Iterator[None]:
    """While entered, this thread's operations meet the region."""
    before = _thread.entered
    _functions.open()
    _thread.entered = region, _saved_tensor_hooks(False)
    try:
        yield
    finally:
        _thread.entered = before
        _functions.close()
        region.close()


def _region() -> Region | None:
    """This thread's region, unless a transform or mode wants to see plain operations.

    Inference mode has no versions to look at. Hooks on saved tensors that were entered within the
    step may be those of a checkpoint, whose recomputation meets no region and has to save what
    the first run saved.
    """
    if torch.compiler.is_compiling():  # what is compiled outlives the region
        return None
    entered = _thread.entered
    if entered is None:
        return None
    region, hooks = entered
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return None
    if torch.is_inference_mode_enabled() or _saved_tensor_hooks(False) != hooks:
        return None
    return None if torch._C._len_torch_function_stack() else region


def _unless_patched(make: Callable[[Function], Function]) -> Callable[[Function], Function]:
    """Leaves a function as it is where others have put theirs in the place of torch's own."""

    def made(plain: Function) -> Function:
        is_builtin = isinstance(plain, BuiltinFunctionType | MethodDescriptorType)
        module = str(getattr(plain, "__globals__", {}).get("__name__"))
        return make(plain) if is_builtin or module.startswith("torch.nn.") else plain

    return made


def _linear(plain: Function) -> Function:
    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:  # noqa: A002
        region = _region()
        output = None if region is None else region.linear(input, weight, bias)
        return plain(input, weight, bias) if output is None else output

    return linear


def _cell(kind: Cell, plain: Function) -> Function:
    def forward(cell: Any, input: Tensor, hx: Any = None) -> Any:  # noqa: A002
        region, result = _region(), None
        if region is not None:
            states = _states(cell, kind.num_states, input, hx)
            result = region.cells.call(cell, kind, input, states)
        return plain(cell, input, hx) if result is None else result

    return forward


def _rnn_cell(plain: Function) -> Function:
    forwards = {name: _cell(RNN(name), plain) for name in ("tanh", "relu")}

    def forward(cell: Any, input: Tensor, hx: Any = None) -> Any:  # noqa: A002
        return forwards.get(cell.nonlinearity, plain)(cell, input, hx)

    return forward


def _states(cell: nn.RNNCellBase, num_states: int, x: Any, hx: Any) -> tuple[Any, ...]:
    """The state as a tuple; the cell begins with zeros by itself."""
    if hx is None and isinstance(x, Tensor) and x.dim() == 2:
        return (x.new_zeros(x.shape[0], cell.hidden_size),) * num_states
    if num_states == 1:
        return (hx,)
    return hx if type(hx) is tuple and len(hx) == num_states else (None,)


def _product(plain: Function) -> Function:
    """`torch.matmul`, `torch.mm`, or a method of tensors that is one of them."""

    def multiply(*args: Any, **kwargs: Any) -> Any:
        region = None if kwargs or len(args) != 2 else _region()
        output = None if region is None else region.product(*args)
        return plain(*args, **kwargs) if output is None else output

    return multiply


def _addmm(plain: Function) -> Function:
    def addmm(*args: Any, **kwargs: Any) -> Any:
        region, output = None if kwargs or len(args) != 3 else _region(), None
        if region is not None and isinstance(args[0], Tensor) and args[0].dim() == 1:
            bias, x, weight = args
            output = region.product(x, weight, bias)
        return plain(*args, **kwargs) if output is None else output

    return addmm


def _embedding(plain: Function) -> Function:
    def embedding(
        input: Tensor,  # noqa: A002
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Any:
        region = None if max_norm is not None or scale_grad_by_freq or sparse else _region()
        output, row = None, -1 if padding_idx is None else padding_idx
        if region is not None and -len(weight) <= row < len(weight):
            row = -1 if padding_idx is None else row % len(weight)
            output = region.embedding(input, weight, row)
        options = (padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
        return plain(input, weight, *options) if output is None else output

    return embedding


def _bilinear(plain: Function) -> Function:
    def bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        region, output = _region(), None
        if region is not None and input1.dim() == input2.dim() == 2:
            output = region.recorded("bilinear", Bilinear, (input1, input2), weight, bias)
        return plain(input1, input2, weight, bias) if output is None else output

    return bilinear


def _convolution(dims: int, plain: Function) -> Function:
    name = f"conv{dims}d"

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
        if region is not None and region.chooses:
            positions = input.numel() // max(input.shape[1], 1)
            region = region if positions <= _MOST_POSITIONS else None
        if region is not None:
            options = (*(_each(size, dims) for size in (stride, padding, dilation)), groups)
            output = region.recorded(name, Convolution, (input,), weight, bias, options)
        if output is not None:
            return output
        return plain(input, weight, bias, stride, padding, dilation, groups)

    return convolve


def _each(size: Any, dims: int) -> tuple[int, ...]:
    return (size,) * dims if isinstance(size, int) else tuple(size) * (dims // len(size))


_makers: dict[tuple[Any, str], Callable[[Function], Function]] = {
    (F, "linear"): _linear,
    (F, "embedding"): _embedding,
    (F, "bilinear"): _bilinear,
    (F, "conv1d"): partial(_convolution, 1),
    (F, "conv2d"): partial(_convolution, 2),
    (torch, "matmul"): _product,
    (torch, "mm"): _product,
    (torch, "addmm"): _addmm,
    (Tensor, "__matmul__"): _product,
    (Tensor, "matmul"): _product,
    (Tensor, "mm"): _product,
    (nn.LSTMCell, "forward"): partial(_cell, LSTM()),
    (nn.GRUCell, "forward"): partial(_cell, GRU()),
    (nn.RNNCell, "forward"): _rnn_cell,
}
_functions = ReplacedFunctions({place: _unless_patched(make) for place, make in _makers.items()})
