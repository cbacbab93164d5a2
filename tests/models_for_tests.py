"""Modules, and one way to collect what a run gives, for the tests of data and updates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import bitwise, gradients, relative_error
from torch import Tensor, nn

from tbptt_ckpt import TBPTT


def skip_unless_torch_runs_lstm(dtype: torch.dtype) -> None:
    """Skip where plain `nn.LSTM` fails under CPU autocast: without AVX-512 in bfloat16."""
    try:
        with torch.autocast("cpu", dtype=dtype):
            nn.LSTM(2, 2)(torch.zeros(3, 1, 2))
    except RuntimeError:
        pytest.skip(f"torch cannot run nn.LSTM in {dtype} on this CPU")


class Grid(nn.Module):
    """A state as large as all that a step makes."""

    def __init__(self) -> None:
        super().__init__()
        self.speed = nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        spread = state.roll(1, 1) + state.roll(-1, 1) - 2 * state
        state = state + self.speed * spread
        return state[:, :1] + x, state


class CountedCalls(nn.Module):
    """Another module, and how many steps it has run."""

    def __init__(self, module: nn.Module, time_dim: int | None = None) -> None:
        super().__init__()
        self.module, self.time_dim = module, time_dim
        self.num_steps = 0

    def forward(self, x: Tensor, state: Any) -> tuple[Any, Any]:
        self.num_steps += 1 if self.time_dim is None else x.shape[self.time_dim]
        return self.module(x, state)


@dataclass(frozen=True)
class Seen:
    """One window as the user sees it when it is yielded."""

    start: int
    new_start: int
    stop: int
    loss: Tensor | None
    grads: list[Tensor | None]
    state: Any
    drift: float
    recomputed_steps: int
    updated: bool
    weights: list[Tensor]


def observe(
    tbptt: TBPTT,
    sequence: object,
    init_state: Any = None,
    *,
    parameters: Iterable[Tensor],
    most: int | None = None,
) -> list[Seen]:
    """All windows, or the first ones, each as it is when it is yielded."""
    parameters, seen = list(parameters), []
    for window in tbptt.windows(sequence, init_state):
        seen.append(
            Seen(
                window.start,
                window.new_start,
                window.stop,
                window.loss,
                gradients(parameters),
                window.state,
                window.drift,
                window.recomputed_steps,
                window.updated,
                [p.detach().clone() for p in parameters],
            )
        )
        if len(seen) == most:
            break
    return seen


def check_same_windows(
    actual: Sequence[Seen], expected: Sequence[Seen], *, tolerance: float = 0.0
) -> None:
    """Hold two runs against each other, bitwise unless there is a tolerance."""
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        places = (one.start, one.new_start, one.stop)
        assert places == (other.start, other.new_start, other.stop)
        assert (one.loss is None) == (other.loss is None), places
        assert one.recomputed_steps == other.recomputed_steps, places
        assert one.updated == other.updated, places
        if tolerance:
            for name in ("grads", "weights"):
                error = relative_error(getattr(one, name), getattr(other, name))
                assert error <= tolerance, (places, name, error)
            if one.loss is not None:
                assert relative_error([one.loss], [other.loss]) <= tolerance, (places, "loss")
            assert abs(one.drift - other.drift) <= tolerance, (places, "drift")
        else:
            assert [g is None for g in one.grads] == [g is None for g in other.grads], places
            for name in ("loss", "grads", "state", "weights"):
                assert bitwise(getattr(one, name), getattr(other, name)), (places, name)
            assert one.drift == other.drift, (places, "drift")


def flat(state: Any) -> list[Tensor]:
    """Tensors of a state by the attributes it has, whatever holds them."""
    if isinstance(state, Tensor):
        return [state]
    if isinstance(state, dict):
        state = list(state.values())
    elif hasattr(state, "__dataclass_fields__"):
        state = [getattr(state, name) for name in state.__dataclass_fields__]
    if isinstance(state, tuple | list):
        return [tensor for item in state for tensor in flat(item)]
    return []


def moving(module: nn.Module, *more: Tensor, lr: float = 0.2) -> torch.optim.Optimizer:
    """An optimizer that moves weights far enough to tell stale ones from today's."""
    return torch.optim.SGD([*module.parameters(), *more], lr=lr)
