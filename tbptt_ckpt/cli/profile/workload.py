"""The work that `tbptt-ckpt profile` measures: a byte-level model on text, made on the spot."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tbptt_ckpt.cli.bytes.contract import check_model, initial_state
from tbptt_ckpt.cli.bytes.corpus import ByteLanes, load_corpus
from tbptt_ckpt.cli.bytes.models import build_model
from tbptt_ckpt.cli.bytes.work import byte_work
from tbptt_ckpt.cli.devices import find_device
from tbptt_ckpt.cli.profile.config import ProfileConfig
from tbptt_ckpt.profiling.work import Work

_LEARNING_RATE = 4e-3


@dataclass(frozen=True, slots=True)
class ByteWorkload:
    """Makes model, optimizer and data in whatever process it is called."""

    config: ProfileConfig

    def build(self) -> Work:
        """The model with its optimizer, at the beginning of the text."""
        config = self.config
        torch.manual_seed(0)
        device = find_device(config.device)
        corpus = load_corpus(config.data, config.lanes)
        source = ByteLanes(corpus.train, config.lanes, device=device)
        module = build_model(
            config.model,
            hidden=config.hidden,
            layers=config.layers,
            device=device,
            dtype=config.dtype,
        )
        inputs, _ = source.read(0, min(2, len(source)))
        check_model(config.model, module, inputs, config.lanes)
        optimizer = torch.optim.Adam(module.parameters(), lr=_LEARNING_RATE)
        state = initial_state(module, config.lanes)
        return byte_work(module, optimizer, source, config.dtype, state)
