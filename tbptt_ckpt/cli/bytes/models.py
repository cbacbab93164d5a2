"""Byte-level language models: what one is, and the built-in ones.

A model reads bytes and answers with logits over the next byte: `(symbols, state) -> (logits,
state)`, over one step, symbols [B] and logits [B, 256], or, where its attribute `per_step` is
False, over a segment, symbols [T, B] and logits [T, B, 256]. Where `outputs_needed()` says that
nobody looks at the logits, it may return None for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.module.outputs import outputs_needed

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
    """A built-in model."""
    if name in _FUSED:
        return SegmentModel(_FUSED[name], hidden, layers)
    if name == "lstmcell":
        return CellModel(hidden, layers)
    raise ArgumentError(
        f"--model {name} is neither lstm, gru, rnn or lstmcell, nor file.py:factory or "
        "package.module:factory"
    )
