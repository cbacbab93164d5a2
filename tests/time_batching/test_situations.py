"""Time batching: every operation in every situation is as in a plain loop, errors included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from batched_situations import (
    LANES,
    OPERATIONS,
    SITUATIONS,
    SOURCES,
    STEPS,
    WIDTH,
    WORDS,
    Situated,
)
from torch import Tensor

from tbptt_ckpt import TBPTT, TbpttError, TensorSequence
from tbptt_ckpt.time_batching import rows

pytestmark = [
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),  # in advances
    pytest.mark.filterwarnings("ignore:Complex modules are a new feature"),
]
TOLERANCES = {
    torch.float64: 1e-11,
    torch.complex128: 1e-11,
    torch.float32: 2e-5,
    torch.bfloat16: 0.25,
}
SKIPPING = {"skipped steps", "skipped steps, asked"}
REFUSED = "inner gradient, differentiated"  # and named in the docs
# Weights that the module writes to within a window are refused, with or without time batching.
ERRORS_OF_THE_PACKAGE = {"weight written"}
# Where an operation is always left to the plain one, and where it is within a part of the step.
LEFT = {"torch.func.grad", "torch.func.vmap", "checkpoint", "reentrant checkpoint"}
REASONS = {
    "checkpoint": "hooks on saved tensors",
    "torch.func.grad": "torch.func",
    "torch.func.vmap": "torch.func",
    "inference mode": "inference mode",
    "a function mode": "a mode",
    "a dispatch mode": "a mode",
}

Result = dict[str, Tensor | None] | Exception


def loss_fn(y: Tensor, target: Tensor) -> Tensor:
    return (y - target).abs().square().mean() if y.is_complex() else F.mse_loss(y, target)


def make(operation: str, source: str, situation: str, dtype: torch.dtype) -> Situated:
    torch.manual_seed(0)
    return Situated(operation, source, SITUATIONS[situation]).to(dtype)


def make_data(situation: str, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor], Tensor, Any]:
    """Inputs and words, targets, and the first state."""
    generator = torch.Generator().manual_seed(1)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    x, y = torch.randn(2, STEPS, LANES, WIDTH, generator=generator, dtype=wide).to(dtype)
    words = torch.randint(WORDS, (STEPS, LANES), generator=generator)
    words[:, 0] = torch.arange(STEPS) % WORDS  # odd and even
    words[3] = 1  # odd
    if situation in SKIPPING:
        x[2] = x[4, 1] = float("nan")
        words[2], words[4] = -1, WORDS
    h = torch.randn(LANES, WIDTH, generator=generator, dtype=wide).to(dtype)
    state = (h, h * 0.5, 0) if situation == "written a step later" else h
    return (x, words), y, state


def by_hand(module: Situated, data: Any) -> Result:
    (x, words), targets, state = data
    h, *rest = state if isinstance(state, tuple) else (state,)
    h = h.clone().requires_grad_() * 1  # as where a leaf begins
    state = (h, rest[0].clone().requires_grad_() * 1, rest[1]) if rest else h
    losses = []
    try:
        for inputs, target in zip(zip(x.clone(), words, strict=True), targets, strict=True):
            y, state = module(inputs, state)
            losses.append(loss_fn(y, target))
        torch.stack(losses).mean().backward()
    except Exception as error:
        return error
    return {name: p.grad for name, p in module.named_parameters()}


def by_window(module: Situated, data: Any, report: set[str], **how: Any) -> Result:
    """The gradients; and into `report` what was batched, and why calls were not."""
    (x, words), targets, state = data
    tbptt = TBPTT(module, loss_fn, STEPS, None, **{"time_batching": True, **how})
    try:
        list(tbptt.windows(TensorSequence((x.clone(), words), targets), state))
    except Exception as error:
        return error
    report.update(o.reason or o.operation.split(" of ")[0] for o in tbptt.batched_operations)
    return {name: p.grad for name, p in module.named_parameters()}


def check(operation: str, source: str, situation: str, dtype: torch.dtype, **how: Any) -> None:
    case = operation, source, situation, dtype
    data, report = make_data(situation, dtype), set[str]()
    if situation == "written a step later":
        how["strategy"] = "retain"  # a kept state must not be written to
    truth, found = by_hand(make(*case), data), by_window(make(*case), data, report, **how)
    if isinstance(truth, Exception) or situation in ERRORS_OF_THE_PACKAGE:
        assert isinstance(found, Exception), (case, truth)
        return
    if situation == REFUSED and isinstance(found, TbpttError):
        assert "time_batching=False" in str(found)
        found = by_window(make(*case), data, set(), **{**how, "time_batching": False})
    elif situation not in LEFT and not dtype.is_complex:
        assert OPERATIONS[operation][2] in report
    assert not isinstance(found, Exception), (case, found)
    if situation in REASONS:
        assert any(REASONS[situation] in line for line in report), (case, report)
    for name, expected in truth.items():
        ours = found[name]
        assert (ours is None) == (expected is None), (case, name)
        if expected is not None:
            scale = expected.abs().max().double() + 1e-30
            error = float((ours - expected).abs().max().double() / scale)
            assert error <= TOLERANCES[dtype], (case, name, error)


# Of every situation some operations, each with one of the sources of its input.
SOME = [
    (operation, SOURCES[(row + column) % len(SOURCES)], situation)
    for row, situation in enumerate(SITUATIONS)
    for column, operation in enumerate(("linear", "at", "embedding", "conv1d", "lstm", "gru"))
]


@pytest.mark.parametrize(("operation", "source", "situation"), SOME)
def test_some_situations(
    operation: str, source: str, situation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "_MOST_STEPS", 2)
    check(operation, source, situation, torch.float64, strategy="uniform:4")


@pytest.mark.parametrize("operation", ["lstm", "gru"])
def test_checkpoints_hand_one_memory_to_two_graphs(operation: str) -> None:
    """What an inner backward would write its gradients into, the other one still needs."""
    how = {"strategy": "uniform:4", "executor": "checkpoint"}
    check(operation, "input", "inner gradient", torch.float64, **how)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("dtype", "strategy", "executor", "rows_at_once"),
    [
        (torch.float64, "uniform:4", "replay", 256),
        (torch.float64, "uniform:4", "checkpoint", 2),
        (torch.float64, "retain", "replay", 2),
        *((dtype, "uniform:4", "replay", 2) for dtype in TOLERANCES if dtype is not torch.float64),
    ],
)
@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_situation(
    operation: str,
    situation: str,
    dtype: torch.dtype,
    strategy: str,
    executor: str,
    rows_at_once: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rows, "_MOST_STEPS", rows_at_once)
    if executor == "checkpoint" and situation == "torch.func.grad":
        pytest.skip("torch's own: no such transform under hooks on saved tensors")
    for source in SOURCES:
        if dtype is torch.bfloat16 and operation == "embedding" and source in ("made", "state"):
            continue  # rounding decides about words
        check(operation, source, situation, dtype, strategy=strategy, executor=executor)


@pytest.mark.parametrize(
    ("situation", "operation", "source"),
    [
        ("written after", "linear", "words"),
        ("written after", "gru", "made"),
        ("written a step later", "linear", "words"),
        ("written a step later", "lstm", "made"),
        ("weight written", "at", "state"),
    ],
)
def test_what_is_an_error_in_a_plain_loop(situation: str, operation: str, source: str) -> None:
    """Else the tests above would hold nothing where they accept errors."""
    error = by_hand(
        make(operation, source, situation, torch.float64), make_data(situation, torch.float64)
    )
    assert isinstance(error, RuntimeError)
    assert "inplace" in str(error)
