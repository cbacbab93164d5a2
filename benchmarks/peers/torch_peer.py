"""What all peers in PyTorch share: a model with the work's weights, and exact peaks."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from benchmarks.peers.work import Arrays, Work
from benchmarks.recomputation import ByteCell, ByteLSTM
from tbptt_ckpt.memory.meter import peak_memory

WARMUP_STEPS = 128


class TorchPeer(ABC):
    """A loop over `nn.LSTMCell`, or `nn.LSTM`, with a readout over bytes.

    Args:
        work: What to do.
        fused: Whether the model is `nn.LSTM`.
        device: Where it is done.
    """

    def __init__(self, work: Work, *, fused: bool, device: torch.device | str = "cpu") -> None:
        self.fused, self.device = fused, device
        self.model = (ByteLSTM if fused else ByteCell)(work.size.width).to(device)
        self.take_weights(work)
        self.inputs = torch.from_numpy(work.inputs).to(device)
        self.targets = torch.from_numpy(work.targets).to(device)

    def take_weights(self, work: Work) -> None:
        """Put the work's weights into the model, and gradients of zero beside them."""
        self._weights = _by_name(self.model)
        for name, weight in self._weights.items():
            weight.data.copy_(torch.from_numpy(work.weights[name]))
            weight.grad = torch.zeros_like(weight)

    @abstractmethod
    def accumulate(self, inputs: Tensor, targets: Tensor) -> float:
        """Add the gradient of the mean loss to `.grad`; return the loss.

        Args:
            inputs: [T, B, F].
            targets: [T, B].
        """

    def warm_up(self) -> None:
        """A short stretch: torch itself has little to learn."""
        self.accumulate(self.inputs[:WARMUP_STEPS], self.targets[:WARMUP_STEPS])

    def run(self) -> float:
        self.model.zero_grad()  # as training does; no peak has gradients, being above those before
        return self.accumulate(self.inputs, self.targets)

    def gradients(self) -> Arrays:
        return {name: weight.grad.cpu().numpy() for name, weight in self._weights.items()}

    def peak_bytes(self) -> int:
        with peak_memory(self.device, rss=False) as memory:
            self.run()
        return memory.peak_bytes


def _by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights by the names that `Work` gives them."""
    return {name.rpartition(".")[2].removesuffix("_l0"): w for name, w in model.named_parameters()}
