"""Byte-level language models: the built-in ones, and the way to the user's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tbptt_ckpt.cli.bytes.contract import VOCAB_SIZE
from tbptt_ckpt.cli.bytes.own_models import call_factory
from tbptt_ckpt.cli.devices import DTYPES
from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.module.outputs import outputs_needed

EMBEDDING_WIDTH = 64


class SegmentModel(nn.Module):
    """Embedding, a fused recurrent layer, linear readout; reads whole segments.

    Args:
        make_recurrent: Makes the layer from its two widths and depth: `nn.LSTM`, `nn.GRU`
            or `nn.RNN`.
        vocab_size: Number of symbols.
        hidden: Width of the recurrent layers.
        layers: Number of them.
    """

    per_step = False

    def __init__(
        self,
        make_recurrent: Callable[[int, int, int], nn.Module],
        vocab_size: int,
        hidden: int,
        layers: int,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, EMBEDDING_WIDTH)
        self.recurrent = make_recurrent(EMBEDDING_WIDTH, hidden, layers)
        self.readout = nn.Linear(hidden, vocab_size)

    def forward(self, symbols: Tensor, state: Any) -> tuple[Tensor | None, Any]:
        """Logits [T, B, V], where they are needed, and the next state, for symbols [T, B]."""
        outputs, state = self.recurrent(self.embedding(symbols), state)
        return self.readout(outputs) if outputs_needed() else None, state


class CellModel(nn.Module):
    """Embedding, a stack of `nn.LSTMCell`, linear readout; reads one step.

    Args:
        vocab_size: Number of symbols.
        hidden: Width of the cells.
        layers: Number of them.
    """

    per_step = True

    def __init__(self, vocab_size: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, EMBEDDING_WIDTH)
        widths = [EMBEDDING_WIDTH] + [hidden] * (layers - 1)
        self.cells = nn.ModuleList(nn.LSTMCell(width, hidden) for width in widths)
        self.readout = nn.Linear(hidden, vocab_size)

    def forward(self, symbols: Tensor, state: Any) -> tuple[Tensor | None, Any]:
        """Logits [B, V], where they are needed, and the next state, (h, c) of each layer.

        Symbols are [B].
        """
        output, new_state = self.embedding(symbols), []
        for cell, cell_state in zip(self.cells, state or [None] * len(self.cells), strict=True):
            new_state.append(cell(output, cell_state))
            output = new_state[-1][0]
        return self.readout(output) if outputs_needed() else None, tuple(new_state)


_FUSED: dict[str, Callable[[int, int, int], nn.Module]] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn": nn.RNN,
}


def build_model(
    name: str,
    *,
    hidden: int,
    layers: int,
    device: torch.device | str = "cpu",
    dtype: str = "float32",
) -> nn.Module:
    """A built-in model, or what the factory `package.module:factory` returns, on its device.

    Raises:
        ArgumentError: An unknown name, or a factory that is no use.
    """
    return _make_model(name, hidden, layers).to(device, DTYPES[dtype])


def _make_model(name: str, hidden: int, layers: int) -> nn.Module:
    if name in _FUSED:
        return SegmentModel(_FUSED[name], VOCAB_SIZE, hidden, layers)
    if name == "lstmcell":
        return CellModel(VOCAB_SIZE, hidden, layers)
    if ":" not in name:
        raise ArgumentError(
            f"--model {name} is neither lstm, gru, rnn or lstmcell, nor package.module:factory"
        )
    return call_factory(name, {"vocab_size": VOCAB_SIZE, "hidden": hidden, "layers": layers})
