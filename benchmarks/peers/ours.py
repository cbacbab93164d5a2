"""This package: one window over the whole sequence, under a strategy or a byte budget."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from benchmarks.peers.torch_peer import TorchPeer
from benchmarks.peers.work import Work
from benchmarks.recomputation import byte_loss
from tbptt_ckpt import TBPTT, TensorSequence
from tbptt_ckpt.memory import tensor_bytes

MIB = 2**20


class OursPeer(TorchPeer):
    """`TBPTT` with k1 = k2 = T and no optimizer.

    Args:
        work: What to do.
        fused: Whether the model is `nn.LSTM`, run per segment.
        budget_mib: Peak of temporaries that is allowed, in MiB; None leaves it to `strategy`.
        options: Further arguments of `TBPTT`.
    """

    def __init__(
        self, work: Work, *, fused: bool, budget_mib: float | None = None, **options: Any
    ) -> None:
        super().__init__(work, fused=fused)
        if budget_mib is not None:
            # A budget of the package counts everything on the device.
            there = tensor_bytes([self.model, self.inputs, self.targets])
            options["memory_budget"] = there + int(budget_mib * MIB)
        num_steps = work.size.num_steps
        per_step = not fused
        self.tbptt = TBPTT(
            self.model, byte_loss, num_steps, num_steps, per_step=per_step, **options
        )

    def accumulate(self, inputs: Tensor, targets: Tensor) -> float:
        loss = self.tbptt.train(TensorSequence(inputs, targets)).loss
        assert loss is not None, "every step has a target"
        return loss


def offers(argument: str) -> bool:
    """Whether this version of the package has an argument of `TBPTT`."""
    return argument in inspect.signature(TBPTT).parameters
