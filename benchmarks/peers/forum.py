"""The forum's algorithm: keep the last k2 steps as separate graphs and walk back over them.

discuss.pytorch.org/t/15500, after its later post, in which each of the last k1 steps
contributes its own loss. Written anew from its description, with the gradients of the states
cleared before each walk (without it windows count twice where k1 < k2), for states that are
tuples, and without an update inside (with one the next backward through a retained graph
raises).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.peers.torch_peer import TorchPeer
from benchmarks.recomputation import byte_loss

State = tuple[Tensor, ...]


@dataclass(frozen=True)
class _Step:
    """One step's graph: from its detached first state to its last state and its loss."""

    before: State
    after: State
    loss: Tensor


class RewiredBPTT:
    """Every `k1` steps, add the gradient of the last `k1` losses, `k2` steps back.

    Args:
        module: `(x_t, state) -> (y_t, state)`.
        loss_fn: `(y_t, target_t) -> ` a scalar.
        k1: Steps between walks.
        k2: Steps that a walk reaches back.
    """

    def __init__(
        self,
        module: Callable[[Tensor, State], tuple[Tensor, State]],
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        k1: int,
        k2: int,
    ) -> None:
        self.module, self.loss_fn, self.k1, self.k2 = module, loss_fn, k1, k2

    def train(self, inputs: Tensor, targets: Tensor, state: State) -> float:
        """Run a sequence; returns the mean of the losses of its steps."""
        steps: deque[_Step] = deque(maxlen=self.k2)
        total = 0.0
        for number, (x, target) in enumerate(zip(inputs, targets, strict=True), start=1):
            before = tuple(part.detach().requires_grad_() for part in state)
            output, state = self.module(x, before)
            steps.append(_Step(before, state, self.loss_fn(output, target) / self.k1))
            if number % self.k1 == 0:
                total += self._walk_back(steps)
        return total / (len(inputs) // self.k1)

    def _walk_back(self, steps: deque[_Step]) -> float:
        """Backward through each step's own graph, handing the state's gradient over."""
        for step in steps:
            for part in step.before:
                part.grad = None
        total, later = 0.0, None
        for age, step in enumerate(reversed(steps)):
            if later is not None:
                grads = [part.grad for part in later.before]
                torch.autograd.backward(step.after, grads, retain_graph=True)
            if age < self.k1:
                step.loss.backward(retain_graph=self.k1 < self.k2)
                total += float(step.loss.detach())
            later = step
        return total


class ForumPeer(TorchPeer):
    """The forum's class with k1 = k2 = T."""

    def accumulate(self, inputs: Tensor, targets: Tensor) -> float:
        num_steps = len(inputs)
        first = torch.zeros(inputs.shape[1:])
        bptt = RewiredBPTT(self.model, byte_loss, num_steps, num_steps)
        return bptt.train(inputs, targets, (first, first.clone()))
