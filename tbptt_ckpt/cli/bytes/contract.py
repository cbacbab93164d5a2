"""What a byte-level model is: how it is called, where it begins, what it must answer.

A model reads bytes and answers with logits over the next byte: `(symbols, state) -> (logits,
state)`, over one step, symbols [B] and logits [B, 256], or, where its attribute `per_step` is
False, over a segment, symbols [T, B] and logits [T, B, 256]. Its first state is what its method
`init_state(lanes)` returns, or None where it has none. Where `outputs_needed()` says that nobody
looks at the logits, it may return None for them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.module.trees import map_tensors

VOCAB_SIZE = 256


def initial_state(module: nn.Module, lanes: int) -> Any:
    """What the module's own `init_state(lanes)` gives, or None where it has none.

    Its floating tensors are moved to where the weights are, in their dtype.
    """
    make = getattr(module, "init_state", None)
    if not callable(make):
        return None
    weight = next(module.parameters())

    def place(tensor: Tensor) -> Tensor:
        return tensor.to(weight.device, weight.dtype if tensor.is_floating_point() else None)

    return map_tensors(place, make(lanes))


def is_per_step(module: nn.Module) -> bool:
    """The module's own `per_step`; one that says nothing reads one step."""
    return bool(getattr(module, "per_step", True))


def check_model(name: str, module: nn.Module, inputs: Tensor, lanes: int) -> None:
    """Call the module once and raise `ArgumentError` unless logits and a state come back.

    Args:
        name: What the user called the model.
        module: The model.
        inputs: Two steps of bytes, [2, lanes].
        lanes: Number of lanes.
    """
    per_step = is_per_step(module)
    given = inputs[0] if per_step else inputs
    expected = (*given.shape, VOCAB_SIZE)
    asked = f"--model {name}, called with bytes {list(given.shape)} and its first state,"
    try:
        with torch.no_grad():
            result = module(given, initial_state(module, lanes))
    except Exception as error:
        raise ArgumentError(f"{asked} raised {in_one_line(error)}") from error
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise ArgumentError(f"{asked} returned {type(result).__name__}, not (logits, state)")
    logits = result[0]
    if not isinstance(logits, Tensor) or tuple(logits.shape) != expected:
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ArgumentError(f"{asked} returned logits {shape}, not {list(expected)}")


def in_one_line(error: Exception) -> str:
    """The error's type and message, whatever lines the message had."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
