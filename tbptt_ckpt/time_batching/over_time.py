"""A recurrent cell over all steps of a run: one autograd node, or torch's kernel.

On the CPU torch's kernel of `nn.LSTM` is the fastest there is where nothing is recorded. Where it
records it keeps three times what a loop keeps, and copies of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tbptt_ckpt.time_batching.candidates import autocast_dtype, is_plain, is_stable
from tbptt_ckpt.time_batching.cells import CellWeights, input_bias_of, is_seen, weight_gradients
from tbptt_ckpt.time_batching.cells_over_time import (
    CellOverTime,
    GRUOverTime,
    LSTMOverTime,
    RNNOverTime,
)
from tbptt_ckpt.time_batching.products import multiply, multiply_back
from tbptt_ckpt.time_batching.taps import Versions, begin_backward, total_of, undisturbed

_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class OverTime(torch.autograd.Function):
    """All steps of a cell: `(x: [L, N, K], states: [N, H] each) -> (outputs, last states)`."""

    @staticmethod
    @undisturbed
    def forward(
        ctx: Any, cell: CellOverTime, x: Tensor, weights: CellWeights, *given: Tensor | None
    ) -> tuple[Tensor, ...]:
        """`given`: the four weights again, for their gradients, and the states."""
        ctx.set_materialize_grads(False)
        states = given[len(weights) :]
        num_steps, lanes, width = *x.shape[:2], weights.hidden.shape[1]
        bias = input_bias_of(weights, resets=cell.resets)
        products = multiply(x.flatten(0, 1), weights.input, bias)
        kept = [x.new_empty(num_steps + 1, lanes, width) for _ in states]
        for each, state in zip(kept, states, strict=True):
            each[0].copy_(state)  # type: ignore[arg-type]
        reset = x.new_empty(num_steps, lanes, width) if cell.resets else None
        saved = products.view(num_steps, lanes, -1), kept, reset
        cell.run(saved, weights)
        ctx.cell, ctx.weights, ctx.versions = cell, weights, Versions(*weights)
        ctx.is_seen = is_seen()
        ctx.save_for_backward(x, saved[0], reset, *kept)
        return kept[0][1:], *(each[-1].clone() for each in kept)

    @staticmethod
    @undisturbed
    def backward(ctx: Any, *grads: Any) -> Any:
        """Gradients of x, the weights and the states."""
        needs = ctx.needs_input_grad
        if all(grad is None for grad in grads):
            return (None,) * len(needs)
        begin_backward(ctx.versions)
        x, gates, reset, *kept = ctx.saved_tensors
        # Another backward may need them.
        if ctx.is_seen or torch._C._autograd._get_current_graph_task_keep_graph():
            gates, reset = gates.clone(), None if reset is None else reset.clone()
        weights, (outputs, *last) = ctx.weights, grads
        zeros = torch.zeros_like(kept[0][0])
        outputs = [zeros] * len(x) if outputs is None else outputs.unbind(0)
        last = [zeros.clone() if grad is None else grad.clone() for grad in last]
        first = ctx.cell.walk_back((gates, kept, reset), weights.hidden, outputs, last)
        grad, flat = gates.flatten(0, 1), x.flatten(0, 1)
        x_grad = multiply_back(grad, weights.input).view_as(x) if needs[1] else None
        found = weight_gradients(
            grad,
            None if reset is None else reset.flatten(0, 1),
            flat,
            kept[0][:-1].flatten(0, 1),
            needs[3:],
            [total_of(weight) for weight in weights],
        )
        return None, x_grad, None, *found, *first


def run_cell(
    cell: nn.RNNCellBase,
    x: Any,
    states: Sequence[Any] | None,
    *,
    takes_kernel: Callable[..., bool] = lambda weight, in_leaves: not in_leaves,
) -> tuple[Tensor, tuple[Tensor, ...]] | None:
    """A cell's output at each step of x: [L, N, K], and its last states, from states: [N, H] each.

    None where the cell is to make them step by step, as under autocast. Without states it begins
    with zeros. `takes_kernel`: of a recurrent weight, and of whether something is recorded: whether
    torch's kernel runs, where there is one.
    """
    weights = CellWeights(*map(cell._parameters.get, _NAMES))  # type: ignore[arg-type]
    kind = _KINDS[type(cell)](cell)
    if not is_plain(x) or weights.input is None or weights.hidden is None:
        return None
    if (weights.input_bias is None) != (weights.hidden_bias is None):
        return None
    if states is None:
        begun = x.new_zeros(*x.shape[1:2], weights.hidden.shape[1])
        states = (begun,) * kind.num_states
    if not all(map(is_stable, weights)) or not _fit(x, states, weights):
        return None
    known = (*(weight for weight in weights if weight is not None), x, *states)
    is_recorded = torch.is_grad_enabled() and any(each.requires_grad for each in known)
    if kind.has_kernel and takes_kernel(weights.hidden, in_leaves=is_recorded):
        return _by_kernel(x, states, weights)
    outputs, *last = OverTime.apply(kind, x, weights, *weights, *states)  # type: ignore[no-untyped-call]
    return outputs, tuple(last)


def has_kernel(cell: nn.RNNCellBase) -> bool:
    """Whether torch has a kernel for all steps of a cell of that kind, faster than a loop."""
    return _KINDS[type(cell)](cell).has_kernel


def _fit(x: Tensor, states: Sequence[Any], weights: CellWeights) -> bool:
    """Whether shapes, dtypes and devices are those that a loop of cells would take, on a CPU."""
    if x.dim() != 3 or not x.is_cpu or autocast_dtype(weights.input) is not None:
        return False
    if x.shape[2] != weights.input.shape[1] or not len(x):
        return False
    for each in (x, weights.hidden, *states):
        if not is_plain(each) or each.dtype != weights.input.dtype:
            return False
    shape = (x.shape[1], weights.hidden.shape[1])
    return x.is_floating_point() and all(state.shape == shape for state in states)


def _by_kernel(
    x: Tensor, states: Sequence[Tensor], weights: CellWeights
) -> tuple[Tensor, tuple[Tensor, ...]]:
    given, (h, c) = [weight for weight in weights if weight is not None], states
    has_bias = weights.input_bias is not None
    outputs, last_h, last_c = torch._VF.lstm(
        x, (h[None], c[None]), given, has_bias, 1, 0.0, False, False, False
    )
    return outputs, (last_h[0], last_c[0])


_KINDS: dict[type, Callable[[Any], CellOverTime]] = {
    nn.LSTMCell: lambda _: LSTMOverTime(),
    nn.GRUCell: lambda _: GRUOverTime(),
    nn.RNNCell: lambda cell: RNNOverTime(cell.nonlinearity),
}
