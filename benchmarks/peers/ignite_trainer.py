"""pytorch-ignite's trainer for truncated BPTT, whose windows do not overlap (k1 = k2)."""

from __future__ import annotations

import torch
from ignite.contrib.engines.tbptt import create_supervised_tbptt_trainer
from torch import Tensor, nn

from benchmarks.peers.torch_peer import TorchPeer
from benchmarks.peers.work import Work
from benchmarks.recomputation import byte_loss


class _Unrolled(nn.Module):
    """The model as Ignite calls it: over a window, with or without a state."""

    def __init__(self, model: nn.Module, *, fused: bool) -> None:
        super().__init__()
        self.model, self.fused = model, fused

    def forward(self, inputs: Tensor, state: object = None) -> tuple[Tensor, object]:
        if self.fused:
            return self.model(inputs, state)
        outputs = []
        for x in inputs.unbind():
            output, state = self.model(x, state)
            outputs.append(output)
        return torch.stack(outputs), state


class IgnitePeer(TorchPeer):
    """One window over the whole sequence; Ignite always updates, here by nothing (lr = 0)."""

    def __init__(self, work: Work, *, fused: bool) -> None:
        super().__init__(work, fused=fused)
        self.unrolled = _Unrolled(self.model, fused=fused)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)

    def accumulate(self, inputs: Tensor, targets: Tensor) -> float:
        trainer = create_supervised_tbptt_trainer(
            self.unrolled, self.optimizer, byte_loss, tbtt_step=len(inputs)
        )
        return trainer.run([(inputs, targets)]).output
