"""The first call of a module: whether it reads time, lanes and its state as it was meant to.

Layers of torch's take any three axes for time, lanes and features, and losses broadcast what
does not fit. So a sequence read along its lanes trains without an error. What can be told from
one call is told here, before anything is changed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tbptt_ckpt.errors import ArgumentError, shown
from tbptt_ckpt.module.inside import is_compiled, modules_in, name_of
from tbptt_ckpt.module.recurrence import Recurrence
from tbptt_ckpt.module.trees import Tree, tensors_of

# What calls of modules raise that were given something else than they expect.
_OF_CALLS = (TypeError, AttributeError, RuntimeError, ValueError, LookupError)


def call_first(recurrence: Recurrence, inputs: Any, state: Any) -> Any:
    """What the module returns, after a look at what its layers were given and returned.

    Raises:
        ArgumentError: A layer reads lanes as time, the state of a cell is returned without an
            output, or the module cannot begin from None.
    """
    returned: list[Any] = []
    try:
        with begins(recurrence, state), _watched(recurrence, inputs, returned):
            result = recurrence.call(inputs, state)
    except _OF_CALLS as error:
        if not isinstance(error, ArgumentError):
            for hint in _hints(recurrence, inputs):
                error.add_note(hint)
        raise
    if isinstance(result, tuple) and len(result) == 2:
        for hidden, cell in returned:
            if result[0] is hidden and result[1] is cell and isinstance(cell, Tensor):
                raise ArgumentError(
                    f"module={name_of(recurrence.module)} returns (h, c) as its nn.LSTMCell does, "
                    "which would be taken for (output, state); return (h, (h, c))"
                )
    return result


@contextmanager
def begins(recurrence: Recurrence, state: Tree) -> Iterator[None]:
    """While entered, a module is called from a first state, perhaps one that holds no tensor.

    Raises:
        ArgumentError: It holds none, and the module cannot begin from it.
    """
    try:
        yield
    except _OF_CALLS as error:
        is_told = isinstance(error, ArgumentError) or tensors_of(state)
        if is_told or (state is None and "NoneType" not in str(error)):
            raise
        raise ArgumentError(
            f"init_state={shown(state)}, and module={name_of(recurrence.module)} cannot begin from "
            f"it: {error}; pass the state at the first step, such as init_state=torch.zeros(lanes, "
            "width), or have the module make it where it gets None"
        ) from error


def is_telling(recurrence: Recurrence, inputs: Any) -> bool:
    """Whether a call told all there is to know: steps and lanes are not as many."""
    axes = None if recurrence.per_step else _axes_of(recurrence, inputs)
    return axes is None or axes[0] != axes[1]


@contextmanager
def _watched(recurrence: Recurrence, inputs: Any, returned: list[Any]) -> Iterator[None]:
    """While entered, layers inside are looked at, and what cells return is collected."""
    axes = _axes_of(recurrence, inputs)
    handles = []
    if not is_compiled(recurrence.module):
        for name, layer in modules_in(recurrence.module):
            if isinstance(layer, nn.LSTMCell):
                handles.append(layer.register_forward_hook(lambda _, __, hc: returned.append(hc)))
            elif isinstance(layer, nn.RNNBase) and recurrence.layer is None and axes is not None:
                look = functools.partial(_check_axes, name, recurrence, axes)
                handles.append(layer.register_forward_pre_hook(look))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _axes_of(recurrence: Recurrence, inputs: Any) -> tuple[int, int] | None:
    """Steps (1 in a step) and lanes of inputs; None where they do not tell."""
    if not isinstance(inputs, Tensor) or inputs.dim() < 1:
        return None
    if recurrence.per_step:
        has_lanes = inputs.dim() > 1 or not inputs.is_floating_point()
        return (1, inputs.shape[0]) if has_lanes else None
    if inputs.dim() < (3 if inputs.is_floating_point() else 2) or recurrence.time_dim > 1:
        return None
    return inputs.shape[recurrence.time_dim], inputs.shape[1 - recurrence.time_dim]


def _check_axes(
    name: str, recurrence: Recurrence, axes: tuple[int, int], layer: nn.RNNBase, inputs: Any
) -> None:
    """Raise `ArgumentError` where a layer reads the lanes of a module's input as its time."""
    given, (steps, lanes) = inputs[0] if inputs else None, axes
    if not isinstance(given, Tensor) or steps == lanes:
        return
    if given.dim() == 2:
        time, others = given.shape[0], 1
    else:
        time, others = given.shape[int(layer.batch_first)], given.shape[1 - layer.batch_first]
    if (time, others) != (lanes, steps):
        return
    asked = "one step" if recurrence.per_step else f"{steps} steps"
    remedy = (
        "give it a time dimension, unsqueeze(0), or make the module one of segments with "
        "per_step=False"
        if recurrence.per_step
        else f"it has batch_first={layer.batch_first}, and the module's inputs have time on "
        f"time_dim={recurrence.time_dim}; say time_dim={int(layer.batch_first)}, or turn them"
    )
    raise ArgumentError(
        f"module={name_of(recurrence.module)} was called with {asked} of {lanes} lanes, and its "
        f"nn.{type(layer).__name__} ({name}), which got {tuple(given.shape)}, reads them as "
        f"{time} steps: {remedy}"
    )


def check_agreement(recurrence: Recurrence, inputs: Any, outputs: Any, targets: Any) -> None:
    """Raise `ArgumentError` where a loss would broadcast an output over other lanes or steps."""
    axes = _axes_of(recurrence, inputs)
    if axes is None or not (isinstance(outputs, Tensor) and isinstance(targets, Tensor)):
        return
    lanes, shape, wanted = axes[1], tuple(outputs.shape), tuple(targets.shape)
    shapes = f"module={name_of(recurrence.module)} returned outputs of shape {shape} for "
    added = outputs.dim() - inputs.dim() - (not inputs.is_floating_point())
    is_alone = recurrence.per_step and shape[:1] == (1,)
    has_time = shape[1:] == wanted or (lanes > 1 and shape[1:2] == (lanes,) and added == 1)
    if is_alone and has_time and wanted:
        raise ArgumentError(
            f"{shapes}one step of inputs {tuple(inputs.shape)}: a dimension more; a module of one "
            "step returns no time dimension (squeeze(0)), one of segments needs per_step=False"
        )
    dim = 0 if recurrence.per_step else 1 - recurrence.time_dim
    have = [size[dim : dim + 1] == (lanes,) for size in (shape, wanted)]
    if lanes > 1 and outputs.dim() > 1 and have[0] != have[1] and _broadcast(shape, wanted):
        raise ArgumentError(
            f"{shapes}targets of shape {wanted}, and inputs of shape {tuple(inputs.shape)} have "
            f"{lanes} lanes on dimension {dim}: the loss would broadcast one over the lanes of the "
            "other; give both as many, for example by expand"
        )


def check_classes(name: str, outputs: Any, targets: Any, *, returned: Tree) -> None:
    """Raise `ArgumentError` where a loss of torch's by class is given classes last.

    Layers give them so, and torch takes dimension 1 for them: it raises unless there are as many
    lanes as classes, and takes one for the other where there are. Then only outputs as the module
    has `returned` them tell: a loss that has turned them knows what it does.
    """
    if not (isinstance(outputs, Tensor) and isinstance(targets, Tensor)) or outputs.dim() < 3:
        return
    as_returned = any(outputs is tensor for tensor in tensors_of(returned))
    fits = outputs.shape[:1] + outputs.shape[2:] == targets.shape and not as_returned
    if outputs.shape[:-1] == targets.shape and not (targets.is_floating_point() or fits):
        raise ArgumentError(
            f"loss_fn calls {name} with {outputs.shape[-1]} classes on the last dimension, and "
            "torch takes dimension 1 for them; flatten what is before it: "
            f"loss_fn=lambda y, target: F.{name}(y.flatten(0, -2), target.flatten())"
        )


def _hints(recurrence: Recurrence, inputs: Any) -> Iterator[str]:
    """What may be wrong with inputs that a module could not take."""
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        return
    held = {p.dtype for p in recurrence.parameters if p.is_floating_point()}
    if held and inputs.dtype not in held:
        name = " and ".join(sorted(str(dtype) for dtype in held))
        yield (
            f"inputs are {inputs.dtype} and the module's weights {name}: give both one, for data "
            "in a file by ArraySequence(..., dtype=...)"
        )
    if inputs.dim() == (1 if recurrence.per_step else 2):
        yield (
            f"a step of the inputs is a vector of {inputs.shape[-1]}, which one lane has as its "
            "features; where these are lanes, give their one feature an axis: array[:, None]"
        )


def _broadcast(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    try:
        torch.broadcast_shapes(shape, other)  # type: ignore[no-untyped-call]
    except RuntimeError:
        return False  # a loss that takes both knows what it does
    return True
