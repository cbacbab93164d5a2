"""What a user's module is: how it is called, over one step or over a segment."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tbptt_ckpt.devices import check_usable
from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.module.inside import (
    is_cell,
    is_layer,
    kind_of,
    name_of,
    owner_of,
    recurrent_layers,
    unwrapped,
)
from tbptt_ckpt.module.recurrent import Recurrent, as_step
from tbptt_ckpt.module.trees import iterate_tensors


@dataclass(frozen=True, slots=True)
class Recurrence:
    """A module, or the callable that was given, together with the way it wants to be called."""

    module: object
    call: Callable[[Any, Any], Any]  # (inputs, state) -> (outputs, state), over step or segment
    per_step: bool  # `call` takes one step without a time dimension
    time_dim: int  # of the inputs and outputs of a segment module
    lane_dim: int  # of the tensors of its state
    layer: nn.RNNBase | None  # that the module is, perhaps in a wrapper
    parameters: tuple[nn.Parameter, ...]  # those of a function are not known


def recognise(
    module: Callable[..., Any],
    per_step: bool | None,
    time_dim: int | None = None,
    lane_dim: int | None = None,
) -> Recurrence:
    """How to call `module`.

    `nn.RNN/LSTM/GRU` are segment modules whose `time_dim` follows from `batch_first`;
    their cells are per-step modules that return only a state, and the output is its
    first tensor. Wrappers of torch's are seen through. Anything else is per-step unless
    `per_step=False`, which must be said of modules that contain an `nn.RNN/LSTM/GRU`, and a
    segment module of the user's has time on `time_dim`, 0 by default.

    The states of `nn.RNN/LSTM/GRU`, [layers, B, H], and of modules that contain one have
    their lanes on dimension 1, others on 0, unless `lane_dim` says otherwise.

    Raises:
        ArgumentError: Not callable with an input and a state, bidirectional, or called in a way
            that it cannot be.
    """
    inner, layers = unwrapped(module), recurrent_layers(module)
    _check_takes_state(module, inner)
    layer = inner if is_layer(inner) else None
    call: Callable[[Any, Any], Any] = module
    if layer is not None:
        if per_step:
            name = type(layer).__name__
            raise ArgumentError(f"per_step=True does not fit nn.{name}, which runs whole segments")
        per_step, time_dim = False, int(layer.batch_first)
    elif isinstance(inner, Recurrent):
        if per_step not in (None, inner.per_step):
            raise ArgumentError(
                f"per_step={per_step} contradicts module=Recurrent, whose transition says "
                f"per_step={inner.per_step}"
            )
        per_step, time_dim = inner.per_step, inner.time_dim
        if inner is module and type(inner).forward is Recurrent.forward:
            call = inner.as_needed
    elif is_cell(inner):
        if per_step is False:
            raise ArgumentError(
                f"per_step=False does not fit {type(inner).__name__}, which runs one step"
            )
        per_step, call = True, as_step(module)
    elif per_step is None and layers:
        name, kind = layers[0][0], kind_of(layers[0][1])
        raise ArgumentError(
            f"module={name_of(module)} contains an nn.{kind}{name and f' ({name})'}, so per_step "
            "must be said: per_step=False if it takes a segment of steps, such as [T, B, F], "
            "per_step=True if it takes one step, such as [B, F], which the layer inside needs "
            "with a time dimension (unsqueeze(0))"
        )
    if per_step is False and (both := [found for found in layers if found[1].bidirectional]):
        name = f"nn.{kind_of(both[0][1])}(bidirectional=True)"
        given = (
            name if layer is not None else f"{name_of(module)} contains {both[0][0]}, an {name}: it"
        )
        raise ArgumentError(
            f"module={given} reads the future, so it has no state to "
            "carry from window to window; use bidirectional=False"
        )
    is_per_step = per_step is not False
    owner = owner_of(module)
    if lane_dim is None:
        lane_dim = 1 if layers and isinstance(owner, nn.Module) else 0
    return Recurrence(
        module=owner,
        call=call,
        per_step=is_per_step,
        time_dim=0 if is_per_step else time_dim or 0,
        lane_dim=lane_dim,
        layer=layer,
        parameters=tuple(parameters_of(module)),
    )


def _check_takes_state(module: object, inner: object) -> None:
    function = getattr(inner, "forward", module) if isinstance(inner, nn.Module) else module
    try:
        signature = inspect.signature(function)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # builtins have none
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise ArgumentError(
            f"module={name_of(module)} is called as module(input, state) and returns (output, "
            f"state), but it takes {signature}: {error}; for a module that keeps its state on "
            "itself write lifted(module, input), of tbptt_ckpt.module, for one without a state "
            "lambda input, state: (module(input), state)"
        ) from None


def check_time_dim(recurrence: Recurrence, given: int | None) -> None:
    """Raise `ArgumentError` where the `time_dim` that was given contradicts the module."""
    if given in (None, recurrence.time_dim):
        return
    name = name_of(recurrence.module)
    if recurrence.per_step:
        raise ArgumentError(
            f"time_dim={given} is where a segment module wants time, and module={name} takes one "
            "step, without time; where data has it is said by its source, such as "
            f"TensorSequence(inputs, targets, time_dim={given})"
        )
    if recurrence.layer is not None:
        raise ArgumentError(
            f"time_dim={given} contradicts module={name} with batch_first="
            f"{recurrence.layer.batch_first}, which has time on {recurrence.time_dim}; leave "
            "time_dim out"
        )


def time_of(recurrence: Recurrence, given: int | None, inputs: object) -> tuple[int, Recurrence]:
    """Where `inputs` have time, and the module as one that wants it there, if it is the user's.

    Unless it is given, the inputs follow the module; an unbatched sequence has it first.
    """
    dim = following_time_dim(recurrence.time_dim, inputs) if given is None else given
    is_own = not recurrence.per_step and recurrence.layer is None
    return dim, replace(recurrence, time_dim=dim) if is_own else recurrence


def following_time_dim(time_dim: int, inputs: object) -> int:
    """Where inputs have time that follow a module; an `nn.LSTM` takes unbatched ones as [T, F]."""
    first = next(iterate_tensors(inputs), None)
    return 0 if first is not None and first.dim() < 3 else time_dim


def split_result(result: object, recurrence: Recurrence) -> tuple[Any, Any]:
    """The `(output, state)` that a call returned, or an error that says what it returned."""
    returned = type(result).__name__
    if isinstance(result, tuple | list):
        if len(result) == 2:
            return result[0], result[1]
        returned += f" of {len(result)}"
    raise ArgumentError(
        f"module={name_of(recurrence.module)} returned a {returned}; it must return (output, state)"
    )


def check_segment_output(outputs: object, num_steps: int, time_dim: int, module: object) -> None:
    """Raise `ArgumentError` unless a segment's output has one entry per step."""
    if isinstance(outputs, Tensor) and outputs.shape[time_dim : time_dim + 1] != (num_steps,):
        raise ArgumentError(
            f"module={name_of(module)} returned outputs of shape {tuple(outputs.shape)} for "
            f"{num_steps} steps with time_dim={time_dim}; a segment module returns one output per "
            "step, a module of one step needs per_step=True"
        )


def parameters_of(*owners: object) -> list[nn.Parameter]:
    """The distinct parameters of all the modules, or their methods, among `owners`."""
    modules = [owner for owner in map(owner_of, owners) if isinstance(owner, nn.Module)]
    return list(dict.fromkeys(p for module in modules for p in module.parameters()))


def renormalised_in(*owners: object) -> frozenset[int]:
    """Weights that a forward writes to, by their identity.

    An embedding with `max_norm` renormalises what it reads, which a second time changes nothing.
    """
    modules = [owner for owner in map(owner_of, owners) if isinstance(owner, nn.Module)]
    return frozenset(
        id(layer.weight)
        for module in modules
        for layer in module.modules()
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.max_norm is not None
    )


def check_differentiable(module: object, device_types: Iterable[str] | None = None) -> None:
    """Raise `ArgumentError` for cuDNN recurrent layers in eval mode.

    cuDNN keeps what its backward needs only in training mode (pytorch issue 15788), and
    the error it raises otherwise comes late and names another call. Where the weights are is
    read from them unless `device_types` says it.
    """
    for name, layer in recurrent_layers(module):
        types = device_types or {p.device.type for p in layer.parameters()}
        if not layer.training and "cuda" in types and torch.backends.cudnn.enabled:
            raise ArgumentError(
                f"module: {name or type(layer).__name__} is a cuDNN nn.{type(layer).__name__} in "
                "eval mode, which cannot be differentiated; call .train() on it (with dropout=0 "
                "if it must not drop), or disable cuDNN with torch.backends.cudnn.enabled = False"
            )


def check_autocast(module: object, dtype: torch.dtype | None) -> None:
    """Raise `ArgumentError` for no floating dtype, or an `nn.LSTM` that this CPU cannot run in it.

    torch hands it to oneDNN then, which has it in bfloat16 for AVX-512 and newer only, and
    whose error names neither.
    """
    if dtype is None:
        return
    if not dtype.is_floating_point:
        raise ArgumentError(
            f"autocast_dtype={dtype} must be a floating dtype such as torch.bfloat16"
        )
    for name, layer in recurrent_layers(module):
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
                outputs, _ = lstm(torch.zeros(1, 1, 1, device="cpu"))
            torch.autograd.grad(outputs.sum(), list(lstm.parameters()))
    except RuntimeError:
        return False
    return True


def check_initialised(name: str, module: object) -> None:
    """Raise `ArgumentError` for weights without a shape or values yet, or on a device of no use."""
    owner = owner_of(module)
    if not isinstance(owner, nn.Module):
        return
    for path, tensor in [*owner.named_parameters(), *owner.named_buffers()]:
        if is_lazy(tensor):
            raise ArgumentError(
                f"{name}: {path!r} belongs to a lazy layer that has not run, so that it has "
                "no shape yet; run one step of the module first"
            )
        if tensor.is_meta:
            raise ArgumentError(
                f"{name}: {path!r} is on the meta device, where nothing has values; call "
                ".to_empty(device='cpu') on the module and load or initialise its weights"
            )
        check_usable(f"{name}: {path!r}", tensor.device)
