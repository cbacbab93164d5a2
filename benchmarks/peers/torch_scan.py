"""`torch._higher_order_ops.scan`: a loop that torch traces as one operation, and differentiates."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan
from torch.utils.checkpoint import checkpoint

from benchmarks.peers.torch_peer import TorchPeer
from benchmarks.peers.work import Work
from benchmarks.recomputation import byte_loss

State = tuple[Tensor, Tensor]


class TorchScanPeer(TorchPeer):
    """The step is written out, since a scan takes no module with weights of its own.

    Args:
        work: What to do.
        checkpointed: Whether segments are checkpoints, the readout within: as long as the divisor
            of T that is nearest to its root, since a scan of another length is another graph.
            Each is a compiled function, without which torch 2.13 cannot recompute a scan ("Mixing
            fake modes NYI"), and traced only, since Inductor refuses it ("might be aliasing").
        where: `device`.
    """

    def __init__(self, work: Work, *, checkpointed: bool, **where: Any) -> None:
        super().__init__(work, fused=False, **where)
        self.checkpointed, num_steps = checkpointed, work.size.num_steps
        self.segment_steps = _near_root(num_steps) if checkpointed else num_steps
        self._traced_segment = torch.compile(self._segment, backend="aot_eager")

    def warm_up(self) -> None:
        """Segments as long as they will be, each of which is a graph of its own."""
        part = slice(0, 2 * self.segment_steps)
        self.accumulate(self.inputs[part], self.targets[part])

    def accumulate(self, inputs: Tensor, targets: Tensor) -> float:
        state = inputs.new_zeros(inputs.shape[1:]), inputs.new_zeros(inputs.shape[1:])
        loss = inputs.new_zeros(())
        for start in range(0, len(inputs), self.segment_steps):
            stop = start + self.segment_steps
            part = inputs[start:stop], targets[start:stop]
            if self.checkpointed:
                found, *state = checkpoint(
                    self._traced_segment,
                    *part,
                    *state,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                found, *state = self._segment(*part, *state)
            loss = loss + found
        loss = loss / len(inputs)
        loss.backward()
        return float(loss.detach())

    def _segment(self, inputs: Tensor, targets: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        state, outputs = scan(self._step, (h, c), inputs)
        return byte_loss(self.model.readout(outputs), targets) * len(inputs), *state

    def _step(self, state: State, x: Tensor) -> tuple[State, Tensor]:
        cell, (h, c) = self.model.cell, state
        sums = x @ cell.weight_ih.T + cell.bias_ih + h @ cell.weight_hh.T + cell.bias_hh
        i, f, g, o = sums.chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return (h, c), h.clone()  # no output of a scan may be its state


def _near_root(num_steps: int) -> int:
    divisors = [each for each in range(1, num_steps + 1) if num_steps % each == 0]
    return min(divisors, key=lambda each: abs(each - math.sqrt(num_steps)))
