"""Steps at which a state's gradient is divided on its way back (`truncation="roulette"`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tbptt_ckpt.module.host import Number, Numbers
from tbptt_ckpt.module.trees import Tree, replace_tensors, tensors_of


class Borders:
    """Divides what flows back over a border, wherever leaves begin and whoever runs them.

    Attributes:
        stops: Whether the gradient is stopped at one, before weights that earlier steps alone have.
        norms: Of the state's gradient as it arrived at each border, as the host reads it.
    """

    def __init__(
        self, divisors: Mapping[int, float], numbers: Numbers, *, stops: bool = False
    ) -> None:
        self._divisors, self._numbers, self.stops = divisors, numbers, stops
        self.norms: dict[int, Number] = {}

    def cross(self, step: int, state: Tree) -> Tree:
        """The state from which `step` runs; the same where there is no border, or no graph."""
        divisor = self._divisors.get(step)
        if divisor is None or not torch.is_grad_enabled():
            return state
        tensors = tensors_of(state)
        passing = [tensor for tensor in tensors if tensor.requires_grad]
        if not passing:
            return state

        def arrive(norm: Tensor) -> None:
            self.norms[step] = self._numbers.ask(norm)

        crossed = iter(_Cross.apply(divisor, arrive, *passing))  # type: ignore[no-untyped-call]
        return replace_tensors(state, [next(crossed) if t.requires_grad else t for t in tensors])


class _Cross(torch.autograd.Function):
    """The same values; their gradients divided."""

    @staticmethod
    def forward(
        ctx: Any, divisor: float, arrive: Callable[[Tensor], None], *state: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.divisor, ctx.arrive = divisor, arrive
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in state)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        found = [grad.detach() for grad in grads if grad is not None]
        if found:
            ctx.arrive(torch.nn.utils.get_total_norm(found))
        return None, None, *(grad if grad is None else grad / ctx.divisor for grad in grads)
