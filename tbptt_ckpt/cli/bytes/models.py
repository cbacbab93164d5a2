"""Byte-level language models: what one is, and the built-in ones.

A model reads bytes and answers with logits over the next byte: `(symbols, state) -> (logits,
state)`, over one step, symbols [B] and logits [B, 256], or, where its attribute `per_step` is
False, over a segment, symbols [T, B] and logits [T, B, 256].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.module.recurrent import Recurrent

VOCAB_SIZE = 256
EMBEDDING_WIDTH = 64


class StackedCells(nn.Module):
    """A stack of `nn.LSTMCell`, as the transition of one step."""

    def __init__(self, width: int, hidden: int, layers: int) -> None:
        super().__init__()
        widths = [width] + [hidden] * (layers - 1)
        self.cells = nn.ModuleList(nn.LSTMCell(width, hidden) for width in widths)

    def forward(self, output: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The last h [B, H], and the next (h, c) of each layer."""
        new_state = []
        for cell, cell_state in zip(self.cells, state or [None] * len(self.cells), strict=True):
            new_state.append(cell(output, cell_state))
            output = new_state[-1][0]
        return output, tuple(new_state)


def _cells(width: int, hidden: int, layers: int) -> nn.Module:
    return nn.LSTMCell(width, hidden) if layers == 1 else StackedCells(width, hidden, layers)


_TRANSITIONS: dict[str, Callable[[int, int, int], nn.Module]] = {  # of two widths and a depth
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn": nn.RNN,
    "lstmcell": _cells,
}


def build_model(name: str, *, hidden: int, layers: int) -> nn.Module:
    """A built-in model: an embedding, a recurrent layer, a linear readout."""
    if name not in _TRANSITIONS:
        raise ArgumentError(
            f"--model {name} is neither lstm, gru, rnn or lstmcell, nor file.py:factory or "
            "package.module:factory"
        )
    embedding = nn.Embedding(VOCAB_SIZE, EMBEDDING_WIDTH)
    transition = _TRANSITIONS[name](EMBEDDING_WIDTH, hidden, layers)
    return Recurrent(transition, embedding, nn.Linear(hidden, VOCAB_SIZE))
