"""This package: one window over the whole sequence, under a strategy or a byte budget."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.torch_peer import WARMUP_STEPS, TorchPeer
from benchmarks.peers.work import Work
from benchmarks.recomputation import byte_loss
from tbptt_ckpt import TBPTT, Recurrent, TensorSequence
from tbptt_ckpt.memory.storages import tensor_bytes

# Windows of as many lengths are metered before the package trusts its costs.
WARMUP_LENGTHS = range(WARMUP_STEPS - 9, WARMUP_STEPS)


class OursPeer(TorchPeer):
    """`TBPTT` with k1 = k2 = T and no optimizer.

    Args:
        work: What to do.
        fused: Whether the model is `nn.LSTM`, run per segment.
        declared: Whether the model of steps says its parts.
        budget_bytes: Peak of temporaries that is allowed; None leaves it to the options.
        device: Where it is done.
        options: Further arguments of `TBPTT`.
    """

    def __init__(
        self,
        work: Work,
        *,
        fused: bool,
        declared: bool = False,
        budget_bytes: int | None = None,
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> None:
        super().__init__(work, fused=fused, device=device)
        module = self.model
        if declared:
            module = Recurrent(module.cell, readout=module.readout)
        self.has_budget = budget_bytes is not None
        if budget_bytes is not None:
            # The package's budget counts what is there anyway: weights, gradients, inputs.
            weights = list(self.model.parameters())
            grads = [weight.grad for weight in weights]
            there = tensor_bytes([weights, grads, self.inputs, self.targets])
            options["memory_budget"] = there + budget_bytes
        num_steps = work.size.num_steps
        per_step = not fused
        self.tbptt = TBPTT(module, byte_loss, num_steps, num_steps, per_step=per_step, **options)

    def warm_up(self) -> None:
        """Short stretches, so that costs are measured and corrected."""
        for num_steps in WARMUP_LENGTHS if self.has_budget else (WARMUP_STEPS,):
            self.model.zero_grad()
            self.accumulate(self.inputs[:num_steps], self.targets[:num_steps])

    def accumulate(self, inputs: Tensor, targets: Tensor) -> float:
        loss = self.tbptt.train(TensorSequence(inputs, targets)).loss
        assert loss is not None, "every step has a target"
        return loss
