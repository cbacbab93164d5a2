"""Lanes and resets: a run with lanes equals its sequences trained one by one.

The default run takes every (lengths, lanes) with three or four of the (k1, k2) and rotates the
other choices; all of them, and the whole product, run under `-m exhaustive`.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import naive_lanes
import pytest
import torch
import torch.nn.functional as F
from cases import (
    EXECUTORS,
    OVERLAPS,
    STRATEGIES,
    WIDTH,
    WIDTH_IN,
    gradients,
    lstm,
    lstm_cell,
    relative_error,
    tanh_cell,
)
from grids import parts
from naive import tensors
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, BurnIn, LaneSource, SharedState, TensorSequence

LENGTHS = [
    lengths for count in (1, 2, 3) for lengths in itertools.product((1, 2, 4), repeat=count)
] + [(3, 1, 2, 1, 4), (5, 1, 1, 3), (1, 1, 1, 1, 1), (7, 2), (2, 6, 3, 3)]
LANES = (1, 2, 3)
K1 = (1, 2, 3, 5)
K2 = (1, 2, 3, 4, 7, None)

# The product of these is the exhaustive grid.
CHOICES: dict[str, tuple[Any, ...]] = {
    "overlap": OVERLAPS,
    "module": ("tanh", "cell", "lstm"),
    "weights": ("frozen", "sgd"),
    "init": ("none", "constant", "learned", "shared"),
}
ROTATED_CHOICES: dict[str, tuple[Any, ...]] = {
    "loss": ("new", "new", "last"),
    "reduction": ("mean", "sum"),
    "burn_in": (0, 0, 1, 2),
    "targets": ("all", "all", "end"),
    "strategy": STRATEGIES,
    "executor": EXECUTORS,
    "time_batching": (False, True),
}


LEARNED = ("learned", "shared")


@dataclass(frozen=True)
class Case:
    """One run of the engine; its repr names it in a failure."""

    lengths: tuple[int, ...]
    lanes: int
    k1: int
    k2: int | None
    overlap: str
    module: str
    weights: str
    init: str
    loss: str
    reduction: str
    burn_in: int
    targets: str
    strategy: str
    executor: str
    time_batching: bool


def layouts() -> Iterator[tuple[tuple[int, ...], int, int, int | None]]:
    return itertools.product(LENGTHS, LANES, K1, K2)


def rotated_cases() -> list[Case]:
    rng = random.Random(2730)
    choices = CHOICES | ROTATED_CHOICES
    return [
        Case(*layout, **{name: v[int(rng.random() * len(v))] for name, v in choices.items()})
        for layout in layouts()
    ]


def sequences_of(lengths: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    return [
        (
            torch.randn(n, WIDTH_IN, generator=generator, dtype=torch.float64),
            torch.randn(n, WIDTH, generator=generator, dtype=torch.float64),
        )
        for n in lengths
    ]


def label_weight(num_steps: int) -> Tensor:
    """One label at the end."""
    return torch.tensor([0.0] * (num_steps - 1) + [1.0])


def module_of(name: str) -> nn.Module:
    return {"tanh": tanh_cell, "cell": lstm_cell, "lstm": lstm}[name]()


def initial_state(case: Case) -> Any:
    """A row of its own for each lane, or one for all."""
    if case.init == "none":
        return None
    generator = torch.Generator().manual_seed(9)
    layers = (1,) if case.module == "lstm" else ()
    rows = 1 if case.init == "shared" else case.lanes
    state = tuple(
        torch.randn(*layers, rows, WIDTH, generator=generator, dtype=torch.float64)
        for _ in range(2)
    )
    if case.init in LEARNED:
        state = tuple(s.requires_grad_() for s in state)
    return state[0] if case.module == "tanh" else state


def row_of(state: Any, lane: int, module: str) -> Any:
    """One lane of a state, with its graph; a single row is every lane's."""
    dim = 1 if module == "lstm" else 0

    def row(tensor: Tensor) -> Tensor:
        return tensor if tensor.shape[dim] == 1 else tensor.narrow(dim, lane, 1)

    if isinstance(state, tuple):
        return tuple(map(row, state))
    return None if state is None else row(state)


def naive_step(module: nn.Module, name: str) -> Any:
    if name != "lstm":
        return module

    def step(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = module(x[None], state)
        return y[0], state

    return step


def optimizer_of(case: Case, parameters: list[Tensor]) -> torch.optim.Optimizer | None:
    return torch.optim.SGD(parameters, lr=0.2) if case.weights == "sgd" else None


def expected_windows(case: Case) -> Iterator[naive_lanes.LaneWindow]:
    module, init = module_of(case.module), initial_state(case)
    learned = tensors(init) if case.init in LEARNED else []
    parameters = [*module.parameters(), *learned]
    problem = naive_lanes.LaneProblem(
        step=naive_step(module, case.module),
        loss_fn=F.mse_loss,
        sequences=sequences_of(case.lengths),
        initial=lambda lane: row_of(init, lane, case.module),
        parameters=parameters,
        burn_in=case.burn_in,
        label_at_the_end=case.targets == "end",
    )
    return naive_lanes.train(
        problem,
        case.lanes,
        case.k1,
        case.k2,
        overlap=case.overlap,
        loss=case.loss,
        reduction=case.reduction,
        optimizer=optimizer_of(case, parameters),
    )


def check(case: Case) -> None:
    module, init = module_of(case.module), initial_state(case)
    learned = tensors(init) if case.init in LEARNED else []
    parameters = [*module.parameters(), *learned]
    sequences = [
        TensorSequence(x, y, weight=label_weight(len(x)) if case.targets == "end" else None)
        for x, y in sequences_of(case.lengths)
    ]
    source: Any = LaneSource(sequences, case.lanes)
    if case.burn_in:
        source = BurnIn(source, case.burn_in)
    tbptt = TBPTT(
        module,
        F.mse_loss,
        case.k1,
        case.k2,
        optimizer_of(case, parameters),
        loss=case.loss,
        reduction=case.reduction,
        overlap=case.overlap,
        strategy=case.strategy,
        executor=case.executor,
        time_batching=case.time_batching,
    )
    given = SharedState(init, case.lanes) if case.init == "shared" else init
    found = tbptt.windows(source, given)
    for window, expected in itertools.zip_longest(found, expected_windows(case)):
        where = (case, window.start, window.stop)
        assert (window.start, window.stop) == (expected.start, expected.stop), where
        assert (window.loss is None) == (expected.loss is None), where
        if window.loss is not None:
            assert relative_error([window.loss], [expected.loss]) <= 1e-12, (where, "loss")
        # Where the naive loop reached nothing there is no gradient, or one of zeros.
        assert relative_error(gradients(parameters), expected.grads) <= 1e-12, (where, "grads")
        for lane, state in expected.states.items():
            rows = tensors(row_of(window.state, lane, case.module))
            assert relative_error(rows, tensors(state)) <= 1e-12, (where, "state", lane)


@pytest.mark.parametrize("part", parts(14))  # has no factor with the choices of k1 and k2
def test_lanes_equal_their_sequences_one_by_one(part: int) -> None:
    for case in rotated_cases()[part::14]:
        check(case)


@pytest.mark.exhaustive
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("lanes", LANES)
def test_lanes_equal_their_sequences_in_every_combination(
    lengths: tuple[int, ...], lanes: int
) -> None:
    rotated = list(itertools.product(*ROTATED_CHOICES.values()))
    grid = itertools.product(K1, K2, *CHOICES.values())
    for position, values in enumerate(grid, start=len(lengths) + 17 * lanes):
        check(Case(lengths, lanes, *values, *rotated[position * 5 % len(rotated)]))
