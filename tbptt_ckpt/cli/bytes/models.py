"""Byte-level language models: what one is, the built-in ones, and the way to the user's.

A model reads bytes and answers with logits over the next byte: `(symbols, state) -> (logits,
state)`, over one step, symbols [B] and logits [B, 256], or, where its attribute `per_step` is
False, over a segment, symbols [T, B] and logits [T, B, 256]. Its first state is what its method
`init_state(lanes)` returns, or None where it has none. Where `outputs_needed()` says that nobody
looks at the logits, it may return None for them.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.module.outputs import outputs_needed
from tbptt_ckpt.module.recurrence import recognise
from tbptt_ckpt.module.trees import map_tensors

VOCAB_SIZE = 256
EMBEDDING_WIDTH = 64
MakeRecurrent = Callable[[int, int, int], nn.Module]  # of two widths and a depth


class SegmentModel(nn.Module):
    """Embedding, a fused recurrent layer, linear readout; reads whole segments."""

    per_step = False

    def __init__(self, recurrent: MakeRecurrent, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB_SIZE, EMBEDDING_WIDTH)
        self.recurrent = recurrent(EMBEDDING_WIDTH, hidden, layers)
        self.readout = nn.Linear(hidden, VOCAB_SIZE)

    def forward(self, symbols: Tensor, state: Any) -> tuple[Tensor | None, Any]:
        """Logits [T, B, V], where they are needed, and the next state, for symbols [T, B]."""
        outputs, state = self.recurrent(self.embedding(symbols), state)
        return self.readout(outputs) if outputs_needed() else None, state


class CellModel(nn.Module):
    """Embedding, a stack of `nn.LSTMCell`, linear readout; reads one step."""

    per_step = True

    def __init__(self, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB_SIZE, EMBEDDING_WIDTH)
        widths = [EMBEDDING_WIDTH] + [hidden] * (layers - 1)
        self.cells = nn.ModuleList(nn.LSTMCell(width, hidden) for width in widths)
        self.readout = nn.Linear(hidden, VOCAB_SIZE)

    def forward(self, symbols: Tensor, state: Any) -> tuple[Tensor | None, Any]:
        """Logits [B, V], where needed, and the next (h, c) of each layer, for symbols [B]."""
        output, new_state = self.embedding(symbols), []
        for cell, cell_state in zip(self.cells, state or [None] * len(self.cells), strict=True):
            new_state.append(cell(output, cell_state))
            output = new_state[-1][0]
        return self.readout(output) if outputs_needed() else None, tuple(new_state)


_FUSED: dict[str, MakeRecurrent] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


def build_model(name: str, *, hidden: int, layers: int) -> nn.Module:
    """A built-in model, or what the factory `package.module:factory` returns."""
    if name in _FUSED:
        return SegmentModel(_FUSED[name], hidden, layers)
    if name == "lstmcell":
        return CellModel(hidden, layers)
    if ":" in name:
        offered = {"vocab_size": VOCAB_SIZE, "hidden": hidden, "layers": layers}
        return call_factory(name, offered)
    raise ArgumentError(
        f"--model {name} is neither lstm, gru, rnn or lstmcell, nor package.module:factory"
    )


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
    """The module's own `per_step`, which must be said where an `nn.RNN/LSTM/GRU` is inside."""
    return recognise(module, getattr(module, "per_step", None)).per_step


def check_model(name: str, module: nn.Module, inputs: Tensor, lanes: int) -> None:
    """Raise `ArgumentError` unless bytes [2, lanes] bring forth logits and a state."""
    per_step = is_per_step(module)
    given = inputs[0] if per_step else inputs
    expected = (*given.shape, VOCAB_SIZE)
    asked = f"--model {name}, called with bytes {list(given.shape)} and its first state,"
    try:
        with torch.no_grad():
            result = module(given, initial_state(module, lanes))
    except Exception as error:
        raise ArgumentError(f"{asked} raised {_in_one_line(error)}") from error
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise ArgumentError(f"{asked} returned {type(result).__name__}, not (logits, state)")
    logits = result[0]
    if not isinstance(logits, Tensor) or tuple(logits.shape) != expected:
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ArgumentError(f"{asked} returned logits {shape}, not {list(expected)}")


def call_factory(name: str, offered: dict[str, int]) -> nn.Module:
    """What `package.module:factory` or `file.py:factory` makes of the arguments that it takes."""
    factory = _find_factory(name)
    arguments = _accepted(name, factory, offered)
    try:
        module = factory(**arguments)
    except Exception as error:
        raise ArgumentError(f"--model {name} raised {_in_one_line(error)}") from error
    if not isinstance(module, nn.Module):
        raise ArgumentError(f"--model {name} returned {type(module).__name__}, not an nn.Module")
    if not any(p.requires_grad for p in module.parameters()):
        raise ArgumentError(f"--model {name} returned a module without trainable parameters")
    return module


def _find_factory(name: str) -> Callable[..., Any]:
    module_name, _, attribute = name.rpartition(":")
    here = str(Path.cwd())
    if here not in sys.path:  # an installed script's path begins elsewhere
        sys.path.insert(0, here)
    try:
        factory: Any = _import(module_name)
        for part in attribute.split("."):
            factory = getattr(factory, part)
    except Exception as error:
        raise ArgumentError(f"--model {name} cannot be found: {_in_one_line(error)}") from error
    if not callable(factory):
        raise ArgumentError(f"--model {name} is {type(factory).__name__}, not a factory to call")
    return cast("Callable[..., Any]", factory)


def _import(name: str) -> ModuleType:
    if not name.endswith(".py"):
        return importlib.import_module(name)
    path = Path(name).resolve()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{name} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses and pickle look their module up
    spec.loader.exec_module(module)
    return module


def _accepted(name: str, factory: Callable[..., Any], offered: dict[str, int]) -> dict[str, int]:
    """Those of the offered arguments that the factory takes by keyword."""
    try:
        parameters = inspect.signature(factory).parameters
    except ValueError:  # some callables written in C have none
        return {}
    various = [p for p in parameters.values() if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    for wanted, p in parameters.items():
        if p.default is p.empty and p not in various and wanted not in offered:
            raise ArgumentError(
                f"--model {name} needs the argument {wanted!r}; offered are {', '.join(offered)}"
            )
    takes_all = any(p.kind is p.VAR_KEYWORD for p in various)
    return {key: value for key, value in offered.items() if takes_all or key in parameters}


def _in_one_line(error: Exception) -> str:
    """The error's type and message, whatever lines the message had."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
