"""Small modules and data that the tests of the engine share, and how results are compared."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import naive
import torch
import torch.nn.functional as F
from devices import placed
from torch import Tensor, nn

from tbptt_ckpt import TensorSequence

WIDTH_IN, WIDTH, LANES = 2, 3, 2

STRATEGIES = (
    "retain",
    "step",
    "uniform:2",
    "uniform:3",
    "sqrt",
    "revolve:1",
    "revolve:2",
    "revolve:3",
)
EXECUTORS = ("replay", "checkpoint")
OVERLAPS = ("refresh", "stale")


class TanhCell(nn.Module):
    """One tensor of state; the output is a linear map of the new state."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrence = nn.Linear(WIDTH_IN + WIDTH, WIDTH)
        self.readout = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        h = x.new_zeros(x.shape[0], WIDTH) if h is None else h
        h = torch.tanh(self.recurrence(torch.cat([x, h], 1)))
        return self.readout(h), h


class LSTMCellWithReadout(nn.Module):
    """Two tensors of state."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(WIDTH_IN, WIDTH)
        self.readout = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        h, c = self.cell(x, state)
        return self.readout(h), (h, c)


class StepByStep(nn.Module):
    """A segment module behind a per-step face."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = self.module(x[None], state)
        return y[0], state


def tanh_cell(seed: int = 0) -> TanhCell:
    torch.manual_seed(seed)
    return placed(TanhCell().double())


def lstm_cell(seed: int = 0) -> LSTMCellWithReadout:
    torch.manual_seed(seed)
    return placed(LSTMCellWithReadout().double())


def lstm(seed: int = 0) -> nn.LSTM:
    torch.manual_seed(seed)
    return placed(nn.LSTM(WIDTH_IN, WIDTH).double())


def random_data(num_steps: int, seed: int = 1, lanes: int = LANES) -> tuple[Tensor, Tensor]:
    """Inputs [T, B, WIDTH_IN] and targets [T, B, WIDTH]."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(num_steps, lanes, WIDTH_IN, generator=generator, dtype=torch.float64)
    targets = torch.randn(num_steps, lanes, WIDTH, generator=generator, dtype=torch.float64)
    return placed(inputs), placed(targets)


def random_state(seed: int = 2, lanes: int = LANES) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return placed(torch.randn(lanes, WIDTH, generator=generator, dtype=torch.float64))


def masked_loss(y: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(loss_sum, weight) of a loss that leaves some positions out, never a whole step."""
    mask = (target < 0.5).to(y.dtype)
    mask[..., 0, 0] = 1.0
    return (mask * (y - target).square()).sum(), mask.sum()


mean_loss = F.mse_loss


def naive_problem(
    module: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    init_state: Any,
    *,
    loss_fn: Any = mean_loss,
    absent: Sequence[int] = (),
    weights: Sequence[float] | None = None,
    extra_parameters: Sequence[Tensor] = (),
) -> naive.Problem:
    """The naive loop's view; `nn.LSTM` gets slices of one step."""
    if isinstance(module, nn.LSTM):
        inputs_by_step = [inputs[t : t + 1] for t in range(len(inputs))]
        targets_by_step = [targets[t : t + 1] for t in range(len(inputs))]
    else:
        inputs_by_step, targets_by_step = list(inputs), list(targets)
    return naive.Problem(
        step=module,
        loss_fn=loss_fn,
        inputs=inputs_by_step,
        targets=[None if t in absent else y for t, y in enumerate(targets_by_step)],
        init_state=init_state,
        parameters=[*module.parameters(), *extra_parameters],
        weights=weights,
        module=module,
    )


def engine_sequence(
    inputs: Tensor,
    targets: Tensor,
    *,
    absent: Sequence[int] = (),
    weights: Sequence[float] | None = None,
) -> Any:
    """The engine's view of the same data: steps where targets are absent, tensors otherwise."""
    if absent:
        return [
            (x, None if t in absent else y)
            for t, (x, y) in enumerate(zip(inputs, targets, strict=True))
        ]
    weight = None if weights is None else torch.tensor(weights, dtype=inputs.dtype)
    return TensorSequence(inputs, targets, weight=weight)


def gradients(parameters: Sequence[Tensor]) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in parameters]


def clear_gradients(parameters: Sequence[Tensor]) -> None:
    for p in parameters:
        p.grad = None


def relative_error(actual: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> float:
    """2-norm of the difference over that of `expected`, all together; None is zero."""
    difference = size = 0.0
    for a, b in zip(actual, expected, strict=True):
        if a is None and b is None:
            continue
        a = torch.zeros_like(b) if a is None else a.detach()
        b = torch.zeros_like(a) if b is None else b.detach()
        a, b = a.cpu(), b.cpu()
        difference += float((a - b).square().sum())
        size += float(b.square().sum())
    if difference == 0.0:
        return 0.0
    return math.sqrt(difference / size) if size else math.inf


def bitwise(actual: Any, expected: Any) -> bool:
    """The same nesting of bitwise equal tensors."""
    a, b = naive.tensors(actual), naive.tensors(expected)
    return len(a) == len(b) and all(
        x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True)
    )


def check_window(
    where: object,
    result: Any,
    grads: Sequence[Tensor | None],
    expected: naive.NaiveWindow,
    *,
    bitwise_state: bool,
    tolerance: float = 1e-12,
) -> None:
    """Hold one `WindowResult` and its gradients against the naive window.

    Bits are compared within one device.
    """
    where = f"{where}, window [{expected.start}, {expected.new_start}, {expected.stop})"
    places = (result.start, result.new_start, result.stop)
    assert places == (expected.start, expected.new_start, expected.stop), (where, places)
    assert (result.loss is None) == (expected.loss is None), (where, result.loss, expected.loss)
    if expected.loss is not None:
        assert result.loss.dim() == 0, where
        assert not result.loss.requires_grad, where
        error = relative_error([result.loss], [expected.loss])
        assert error <= tolerance, (where, "loss", error, result.loss, expected.loss)
    error = relative_error(grads, expected.grads)
    assert error <= tolerance, (where, "gradients", error)
    state, expected_state = naive.tensors(result.state), naive.tensors(expected.state)
    assert not any(s.requires_grad for s in state), (where, "state requires grad")
    if bitwise_state and [s.device for s in state] == [s.device for s in expected_state]:
        assert bitwise(state, expected_state), (where, "state", state, expected_state)
    else:
        error = relative_error(state, expected_state)
        assert error <= tolerance, (where, "state", error)
    assert result.drift is not None, (where, "drift")
    error = abs(result.drift - expected.drift)
    assert error <= tolerance, (where, "drift", result.drift, expected.drift)


def twin(module: nn.Module, init_state: Any) -> tuple[nn.Module, Any]:
    """Independent copies, so that two runs start alike."""
    return copy.deepcopy(module), copy.deepcopy(init_state)
