"""`torch.utils.checkpoint` over segments of ceil(sqrt(T)) steps, and one backward."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from benchmarks.peers.torch_peer import TorchPeer
from benchmarks.peers.work import Work


class CheckpointPeer(TorchPeer):
    """Each segment is a checkpoint: its graph is dropped and recomputed in the backward.

    Args:
        work: What to do.
        fused: Whether the model is `nn.LSTM`.
        reentrant: Which of torch's two implementations.
        where: `device`.
    """

    def __init__(self, work: Work, *, fused: bool, reentrant: bool, **where: Any) -> None:
        super().__init__(work, fused=fused, **where)
        self.reentrant = reentrant

    def accumulate(self, inputs: Tensor, targets: Tensor) -> float:
        segment = math.isqrt(len(inputs) - 1) + 1
        loss = inputs.new_zeros(())
        state = self._first_state(inputs)
        for start in range(0, len(inputs), segment):
            part = slice(start, start + segment)
            loss_of_part, *state = checkpoint(
                self._segment,
                inputs[part],
                targets[part],
                *state,
                use_reentrant=self.reentrant,
                preserve_rng_state=False,  # nothing is random
            )
            loss = loss + loss_of_part
        loss = loss / len(inputs)
        loss.backward()
        return float(loss.detach())

    def _first_state(self, inputs: Tensor) -> list[Tensor]:
        """Zeros; a reentrant checkpoint has a gradient only if one of its inputs does."""
        shape = ((1,) if self.fused else ()) + tuple(inputs.shape[1:])
        return [inputs.new_zeros(shape).requires_grad_(self.reentrant) for _ in range(2)]

    def _segment(self, inputs: Tensor, targets: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        if self.fused:
            logits, state = self.model(inputs, (h, c))
            loss = cross_entropy(logits.flatten(0, 1), targets.flatten())
            return loss * len(inputs), *state
        total, state = inputs.new_zeros(()), (h, c)
        for x, target in zip(inputs.unbind(), targets.unbind(), strict=True):
            logits, state = self.model(x, state)
            total = total + cross_entropy(logits, target)
        return total, *state
