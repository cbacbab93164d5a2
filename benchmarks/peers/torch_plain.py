"""PyTorch as everybody writes it: run everything, then one backward."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.peers.torch_peer import TorchPeer
from benchmarks.recomputation import byte_loss


class PlainPeer(TorchPeer):
    """Plain BPTT."""

    def accumulate(self, inputs: Tensor, targets: Tensor) -> float:
        loss = (self._over_sequence if self.fused else self._over_steps)(inputs, targets)
        loss.backward()
        return float(loss.detach())

    def _over_steps(self, inputs: Tensor, targets: Tensor) -> Tensor:
        state, total = None, inputs.new_zeros(())
        for x, target in zip(inputs.unbind(), targets.unbind(), strict=True):
            logits, state = self.model(x, state)
            total = total + cross_entropy(logits, target)
        return total / len(inputs)

    def _over_sequence(self, inputs: Tensor, targets: Tensor) -> Tensor:
        logits, _ = self.model(inputs, None)
        return byte_loss(logits, targets)
