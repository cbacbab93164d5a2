"""Each limit of `docs/limitations.md` names a test; those that stand nowhere else stand here."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from cases import lstm, lstm_cell, random_data, tanh_cell
from torch import Tensor

from tbptt_ckpt import TBPTT, TensorSequence, evaluate
from tbptt_ckpt.executor.additivity import MeanCheck

ROOT = Path(__file__).parent.parent
ROWS = [
    line
    for line in (ROOT / "docs" / "limitations.md")
    .read_text()
    .partition("## Losses")[2]
    .splitlines()
    if line.startswith("| ") and not line.startswith("| limit |")
]


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_a_limit_names_tests_that_exist(row: str) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row.rsplit("|", 2)[1])
    assert named, f"no test: {row}"
    for path, test in named:
        functions = ast.walk(ast.parse((ROOT / path).read_text()))
        assert any(isinstance(f, ast.FunctionDef) and f.name == test for f in functions), row


def test_pages_are_linked() -> None:
    for page in ("README.md", "docs/semantics.md", "docs/memory_budget.md"):
        assert "limitations.md" in (ROOT / page).read_text()


def gradient(loss_fn: object, strategy: str, *, segments: bool) -> Tensor:
    module = lstm() if segments else tanh_cell()
    tbptt = TBPTT(module, loss_fn, 12, 12, strategy=strategy)
    tbptt.train(TensorSequence(*random_data(12)))
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def half_a_sum(y: Tensor, target: Tensor) -> Tensor:
    return 0.5 * torch.nn.functional.mse_loss(y, target, reduction="sum")


def half_a_mean(y: Tensor, target: Tensor) -> Tensor:
    return 0.5 * torch.nn.functional.mse_loss(y, target)


@pytest.mark.parametrize(("strategy", "segments"), [("uniform:5", False), ("step", True)])
def test_a_scaled_sum_of_a_step_is_taken_as_a_mean(strategy: str, segments: bool) -> None:
    count = random_data(12)[1][0].numel()
    found = gradient(half_a_sum, strategy, segments=segments)
    assert torch.allclose(found, count * gradient(half_a_mean, "retain", segments=segments))


def test_hooks_of_other_leaf_tensors_run_once_for_each_leaf() -> None:
    calls: list[Tensor] = []
    inputs, targets = random_data(12)
    inputs.requires_grad_().register_hook(calls.append)
    tbptt = TBPTT(lstm_cell(), torch.nn.functional.mse_loss, 12, 12, strategy="uniform:4")
    tbptt.train(TensorSequence(inputs, targets))
    assert len(calls) == 3


def test_a_loss_that_is_no_mean_between_two_looks() -> None:
    looked: list[int] = []

    def loss_fn(y: Tensor, target: Tensor) -> Tensor:
        looked.append(1)
        return (y - target)[target < 2].square().mean()

    check, y, target = MeanCheck(loss_fn), torch.randn(10, 3), torch.rand(10, 3)
    for _ in range(9):
        check.check((y, target), 10, 0)
    target[5] = 3.0
    before = len(looked)
    check.check((y, target), 10, 0)
    assert len(looked) == before


def test_an_evaluation_cuts_what_couples_steps() -> None:
    def rough(y: Tensor, target: Tensor) -> Tensor:
        return (y - target).square().mean() + (y[1:] - y[:-1]).square().sum()

    data = TensorSequence(*random_data(12))
    losses = [evaluate(lstm(), rough, data, segment_steps=steps).loss for steps in (4, 12)]
    assert losses[0] != losses[1]
