"""What a user's module is: how it is called, over one step or over a segment."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tbptt_ckpt.errors import ArgumentError


@dataclass(frozen=True, slots=True)
class Recurrence:
    """A module, or the callable that was given, together with the way it wants to be called."""

    module: object
    call: Callable[[Any, Any], Any]  # (inputs, state) -> (outputs, state), over step or segment
    per_step: bool  # `call` takes one step without a time dimension
    time_dim: int  # of the inputs and outputs of a segment module
    lane_dim: int  # of the tensors of its state
    parameters: tuple[nn.Parameter, ...]  # those of a function are not known


def owner_of(function: object) -> object:
    """The module that a bound method or a `functools.partial` calls, otherwise what was given."""
    while isinstance(function, functools.partial):
        function = function.func
    owner = getattr(function, "__self__", None)
    return owner if isinstance(owner, nn.Module) else function


def recognise(
    module: object,
    per_step: bool | None,
    time_dim: int | None = None,
    lane_dim: int | None = None,
) -> Recurrence:
    """How to call `module`.

    `nn.RNN/LSTM/GRU` are segment modules whose `time_dim` follows from `batch_first`;
    their cells are per-step modules that return only a state, and the output is its
    first tensor. Anything else is per-step unless `per_step=False`, and a segment module of
    the user's has time on `time_dim`, 0 by default.

    The states of `nn.RNN/LSTM/GRU`, [layers, B, H], and of modules that contain one have
    their lanes on dimension 1, others on 0, unless `lane_dim` says otherwise.

    Raises:
        ArgumentError: Not callable, bidirectional, or called in a way it cannot be.
    """
    if not callable(module):
        raise ArgumentError(f"module={module!r} is not callable; pass an nn.Module or a function")
    if per_step not in (None, True, False):
        raise ArgumentError(f"per_step={per_step!r} must be True, False or None")
    if lane_dim is None:
        lane_dim = 1 if _recurrent_layers(module) else 0
    call: Callable[[Any, Any], Any] = module
    owner, is_per_step = owner_of(module), per_step is not False
    if isinstance(module, nn.RNNBase):
        name = type(module).__name__
        if per_step:
            raise ArgumentError(f"per_step=True does not fit nn.{name}, which runs whole segments")
        if module.bidirectional:
            raise ArgumentError(
                f"module=nn.{name}(bidirectional=True) reads the future, so it has no state to "
                "carry from window to window; use bidirectional=False"
            )
        is_per_step, time_dim = False, int(module.batch_first)
    elif isinstance(module, nn.RNNCellBase):
        if per_step is False:
            raise ArgumentError(
                f"per_step=False does not fit {type(module).__name__}, which runs one step"
            )
        call, time_dim = functools.partial(_call_cell, module), 0
    parameters = tuple(parameters_of(module))
    return Recurrence(owner, call, is_per_step, time_dim or 0, lane_dim, parameters)


def time_dim_of(module: object, per_step: bool | None, given: int | None) -> int:
    """Where a sequence for `module` has time, unless it is given."""
    return recognise(module, per_step).time_dim if given is None else given


def _call_cell(cell: nn.RNNCellBase, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
    new_state = cell(inputs, state)
    return (new_state if isinstance(new_state, Tensor) else new_state[0]), new_state


def split_result(result: object, recurrence: Recurrence) -> tuple[Any, Any]:
    """The `(output, state)` that a call returned, or an error that says what it returned."""
    returned = type(result).__name__
    if isinstance(result, tuple | list):
        if len(result) == 2:
            return result[0], result[1]
        returned += f" of {len(result)}"
    raise ArgumentError(
        f"module={_name(recurrence.module)} returned a {returned}; it must return (output, state)"
    )


def check_segment_output(outputs: object, num_steps: int, time_dim: int, module: object) -> None:
    """Raise `ArgumentError` unless a segment's output has one entry per step."""
    if isinstance(outputs, Tensor) and outputs.shape[time_dim : time_dim + 1] != (num_steps,):
        raise ArgumentError(
            f"module={_name(module)} returned outputs of shape {tuple(outputs.shape)} for "
            f"{num_steps} steps with time_dim={time_dim}; a segment module returns one output per "
            "step, a module of one step needs per_step=True"
        )


def parameters_of(*owners: object) -> list[nn.Parameter]:
    """The distinct parameters of all the modules, or their methods, among `owners`."""
    modules = [owner for owner in map(owner_of, owners) if isinstance(owner, nn.Module)]
    return list(dict.fromkeys(p for module in modules for p in module.parameters()))


def device_of(weights: Sequence[Tensor]) -> torch.device:
    """Where the weights are; the CPU where none are known."""
    return weights[0].device if weights else torch.device("cpu")


def check_differentiable(module: object, device_types: Iterable[str] | None = None) -> None:
    """Raise `ArgumentError` for cuDNN recurrent layers in eval mode.

    cuDNN keeps what its backward needs only in training mode (pytorch issue 15788), and
    the error it raises otherwise comes late and names another call. Where the weights are is
    read from them unless `device_types` says it.
    """
    for name, layer in _recurrent_layers(module):
        types = device_types or {p.device.type for p in layer.parameters()}
        if not layer.training and "cuda" in types and torch.backends.cudnn.enabled:
            raise ArgumentError(
                f"module: {name or type(layer).__name__} is a cuDNN nn.{type(layer).__name__} in "
                "eval mode, which cannot be differentiated; call .train() on it (with dropout=0 "
                "if it must not drop), or disable cuDNN with torch.backends.cudnn.enabled = False"
            )


def check_autocast(module: object, dtype: torch.dtype | None) -> None:
    """Raise `ArgumentError` for an `nn.LSTM` that this CPU cannot run under autocast.

    torch hands it to oneDNN then, which has it in bfloat16 for AVX-512 and newer only, and
    whose error names neither.
    """
    for name, layer in _recurrent_layers(module) if dtype is not None else ():
        on_cpu = any(parameter.device.type == "cpu" for parameter in layer.parameters())
        if isinstance(layer, nn.LSTM) and on_cpu and not _cpu_runs_lstm(dtype):
            raise ArgumentError(
                f"autocast_dtype={dtype} does not fit module: torch cannot run "
                f"{name or 'it'}, an nn.LSTM, under it on this CPU; use full precision "
                "(autocast_dtype=None, --dtype float32), nn.GRU or nn.LSTMCell"
            )


@functools.cache
def _cpu_runs_lstm(dtype: torch.dtype) -> bool:
    lstm = nn.LSTM(1, 1, device="meta").to_empty(device="cpu")  # draws no random numbers
    try:
        # With a graph: oneDNN has some dtypes on some CPUs for inference only.
        with torch.inference_mode(False), torch.enable_grad():
            with torch.autocast("cpu", dtype=dtype):
                outputs, _ = lstm(torch.zeros(1, 1, 1))
            torch.autograd.grad(outputs.sum(), list(lstm.parameters()))
    except RuntimeError:
        return False
    return True


def check_initialised(name: str, module: object) -> None:
    """Raise `ArgumentError` for lazy layers that have not run, whose weights have no shape yet."""
    owner = owner_of(module)
    if isinstance(owner, nn.Module):
        for path, tensor in [*owner.named_parameters(), *owner.named_buffers()]:
            if is_lazy(tensor):
                raise ArgumentError(
                    f"{name}: {path!r} belongs to a lazy layer that has not run, so that it has "
                    "no shape yet; run one step of the module first"
                )


def _recurrent_layers(module: object) -> list[tuple[str, nn.RNNBase]]:
    owner = owner_of(module)
    found = owner.named_modules() if isinstance(owner, nn.Module) else ()
    return [(name, layer) for name, layer in found if isinstance(layer, nn.RNNBase)]


def _name(module: object) -> str:
    return getattr(module, "__name__", type(module).__name__)
