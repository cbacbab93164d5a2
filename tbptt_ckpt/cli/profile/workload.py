"""The work that `tbptt-ckpt profile` measures: a byte-level model on text, made on the spot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from tbptt_ckpt.cli.bytes.contract import check_model, initial_state, is_per_step
from tbptt_ckpt.cli.bytes.corpus import ByteLanes, load_corpus
from tbptt_ckpt.cli.bytes.models import build_model
from tbptt_ckpt.cli.bytes.score import byte_loss
from tbptt_ckpt.cli.devices import DTYPES, autocast_dtype
from tbptt_ckpt.cli.train.engine import CLIP_GRAD_NORM
from tbptt_ckpt.profiling.work import Work

_LEARNING_RATE = 4e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteWorkload:
    """Makes model, optimizer and data in whatever process it is called.

    Attributes:
        model: As for `tbptt-ckpt train`.
        data: A file; None takes the standard library's source text.
        hidden: Width of the recurrent layers.
        layers: Number of recurrent layers.
        lanes: Parallel streams.
        device: Where to run.
        dtype: As for `tbptt-ckpt train`.
        seed: Of the weights.
    """

    model: str
    data: Path | None
    hidden: int
    layers: int
    lanes: int
    device: str
    dtype: str
    seed: int = 0

    def build(self) -> Work:
        """The model with its optimizer, at the beginning of the text."""
        torch.manual_seed(self.seed)
        device = torch.device(self.device)
        source = ByteLanes(load_corpus(self.data, self.lanes).train, self.lanes, device=device)
        module = build_model(self.model, hidden=self.hidden, layers=self.layers)
        module = module.to(device, DTYPES[self.dtype])
        inputs, _ = source.read(0, min(2, len(source)))
        check_model(self.model, module, inputs, self.lanes)
        return Work(
            module=module,
            loss_fn=byte_loss,
            source=source,
            init_state=initial_state(module, self.lanes),
            optimizer=torch.optim.Adam(module.parameters(), lr=_LEARNING_RATE),
            options={
                "per_step": is_per_step(module),
                "clip_grad_norm": CLIP_GRAD_NORM,
                "autocast_dtype": autocast_dtype(self.dtype),
            },
        )
