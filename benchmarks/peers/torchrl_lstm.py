"""TorchRL's recurrent module, whose loop is a scan and can be recomputed in the backward."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.modules import LSTMModule, set_recurrent_mode

from benchmarks.peers.torch_peer import TorchPeer
from benchmarks.peers.work import Work
from benchmarks.recomputation import byte_loss


class TorchRLPeer(TorchPeer):
    """`LSTMModule` over the whole sequence, and the readout over all steps.

    Args:
        work: What to do.
        backend: Its `recurrent_backend`.
        recompute: Its `recurrent_recompute`.
        where: `device`.
    """

    def __init__(self, work: Work, *, backend: str, recompute: str, **where: Any) -> None:
        super().__init__(work, fused=True, **where)
        width = work.size.width
        self.module = LSTMModule(
            input_size=width,
            hidden_size=width,
            python_based=backend != "pad",
            recurrent_backend=backend,
            recurrent_recompute=recompute,
            in_key="x",
            out_key="h",
        )
        self.model.lstm = self.module.lstm
        self.take_weights(work)

    def accumulate(self, inputs: Tensor, targets: Tensor) -> float:
        num_steps, lanes = targets.shape
        data = TensorDict(
            {"x": inputs.transpose(0, 1), "is_init": torch.zeros(lanes, num_steps, 1).bool()},
            [lanes, num_steps],
        )
        with set_recurrent_mode(True):
            outputs = self.module(data)["h"]
        loss = byte_loss(self.model.readout(outputs.transpose(0, 1)), targets)
        loss.backward()
        return float(loss.detach())
