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
from functools import partial, wraps
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from tbptt_ckpt.module.replaced import Function, ReplacedFunctions
from tbptt_ckpt.time_batching.candidates import is_plain
from tbptt_ckpt.time_batching.cell_calls import CellCalls
from tbptt_ckpt.time_batching.cell_kinds import GRU, LSTM, RNN
from tbptt_ckpt.time_batching.cells import Cell
from tbptt_ckpt.time_batching.operations import Bilinear, Convolution1d, Convolution2d
from tbptt_ckpt.time_batching.region import Region
from tbptt_ckpt.time_batching.taps import undisturbed

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
    for name in _functions.left():
        region.leave(name, "a function that others have put in the place of torch's own")
    _thread.entered = region, _saved_tensor_hooks(False)
    try:
        yield
    finally:
        _thread.entered = before
        _functions.close()
        region.cells.close()


@contextmanager
def suspended() -> Iterator[None]:
    """While entered, this thread's operations are plain: they are of all steps already."""
    before, _thread.entered = _thread.entered, None
    try:
        yield
    finally:
        _thread.entered = before


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
        reason = "a transform of torch.func, or forward differentiation"
    elif torch.is_inference_mode_enabled():
        reason = "inference mode"
    elif _saved_tensor_hooks(False) != hooks:
        reason = "hooks on saved tensors, as those of a checkpoint"
    elif torch._C._len_torch_dispatch_stack() or has_function_mode():
        reason = "a mode that sees each operation"
    else:
        return region
    region.leave("call", reason)
    return None


def has_function_mode() -> bool:
    """Whether one looks at operations; that of a default device looks at what makes tensors."""
    num_modes = torch._C._len_torch_function_stack()
    if not num_modes:
        return False
    modes = map(torch._C._get_function_stack_at, range(num_modes))
    return any(type(mode) is not DeviceContext for mode in modes)


def _unless_patched(make: Callable[[Function], Function]) -> Callable[[Function], Function]:
    """Leaves a function as it is where others have put theirs in the place of torch's own."""

    def made(plain: Function) -> Function:
        return wraps(plain)(make(plain)) if _is_torchs_own(plain) else plain

    return made


def _is_torchs_own(function: Function) -> bool:
    if isinstance(function, FunctionType):  # whose `__module__` others copy
        return str(function.__globals__.get("__name__")).startswith("torch.nn.")
    module = getattr(function, "__objclass__", function).__module__
    return str(module).partition(".")[0] == "torch"


def _cell(kind: Cell, plain: Function) -> Function:
    attempt = undisturbed(CellCalls.call)

    def forward(cell: Any, input: Tensor, hx: Any = None) -> Any:  # noqa: A002
        region, result = _region(), None
        if region is not None:
            states = _states(cell, kind.num_states, input, hx)
            result = attempt(region.cells, cell, kind, input, states)
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


def _attempted(
    attempt: Callable[..., Tensor | None], plain: Function, num_operands: int | None = None
) -> Function:
    """A function with an attempt of the same arguments, of whose calls a region may take some.

    Of products they are those of so many operands, and of nothing by name.
    """
    attempt = undisturbed(attempt)

    def function(*args: Any, **kwargs: Any) -> Any:
        is_open = num_operands is None or (len(args) == num_operands and not kwargs)
        region = _region() if is_open else None
        output = None if region is None else attempt(region, *args, **kwargs)
        return plain(*args, **kwargs) if output is None else output

    return function


def _bilinear(
    region: Region, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor | None:
    if not is_plain(input1) or not is_plain(input2) or not input1.dim() == input2.dim() == 2:
        return None
    return region.recorded(Bilinear, (input1, input2), weight, bias)


def _convolution(
    dims: int,
    region: Region,
    input: Tensor,  # noqa: A002
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    kind = Convolution1d if dims == 1 else Convolution2d
    if not is_plain(input) or input.dim() != dims + 2 or isinstance(padding, str):
        region.leave(kind.name, "an input of another type, no batch of lanes, or padding by a word")
        return None
    if region.chooses and input.numel() // max(input.shape[1], 1) > _MOST_POSITIONS:
        region.leave(kind.name, "more positions than pay")
        return None
    sizes = (_each(size, dims) for size in (stride, padding, dilation))
    options = (*sizes, False, (0,) * dims, groups)
    return region.recorded(kind, (input,), weight, bias, (options,))


def _each(size: Any, dims: int) -> tuple[int, ...]:
    return (size,) * dims if isinstance(size, int) else tuple(size) * (dims // len(size))


_makers: dict[tuple[Any, str], Callable[[Function], Function]] = {
    (F, "linear"): partial(_attempted, Region.linear),
    (F, "embedding"): partial(_attempted, Region.embedding),
    (F, "bilinear"): partial(_attempted, _bilinear),
    (F, "conv1d"): partial(_attempted, partial(_convolution, 1)),
    (F, "conv2d"): partial(_attempted, partial(_convolution, 2)),
    (torch, "matmul"): partial(_attempted, Region.product, num_operands=2),
    (torch, "mm"): partial(_attempted, Region.matrix_product, num_operands=2),
    (torch, "addmm"): partial(_attempted, Region.matrix_product, num_operands=3),
    (Tensor, "__matmul__"): partial(_attempted, Region.product, num_operands=2),
    (Tensor, "matmul"): partial(_attempted, Region.product, num_operands=2),
    (Tensor, "mm"): partial(_attempted, Region.matrix_product, num_operands=2),
    (nn.LSTMCell, "forward"): partial(_cell, LSTM()),
    (nn.GRUCell, "forward"): partial(_cell, GRU()),
    (nn.RNNCell, "forward"): _rnn_cell,
}
_functions = ReplacedFunctions({place: _unless_patched(make) for place, make in _makers.items()})
