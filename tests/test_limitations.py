"""Each limit of `docs/limitations.md` names a test; those that stand nowhere else stand here."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from cases import lstm, lstm_cell, random_data, tanh_cell
from torch import Tensor

from tbptt_ckpt import TBPTT, TensorSequence

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


def test_a_scaled_sum_of_a_step_is_taken_as_a_mean() -> None:
    def half_of_sum(y: Tensor, target: Tensor) -> Tensor:
        return 0.5 * torch.nn.functional.mse_loss(y, target, reduction="sum")

    def mean(y: Tensor, target: Tensor) -> Tensor:
        return 0.5 * torch.nn.functional.mse_loss(y, target)

    count = random_data(12)[1][0].numel()
    found = gradient(half_of_sum, "uniform:5", segments=False)
    assert torch.allclose(found, count * gradient(mean, "retain", segments=False))


def test_hooks_of_other_leaf_tensors_run_once_for_each_leaf() -> None:
    calls: list[Tensor] = []
    inputs, targets = random_data(12)
    inputs.requires_grad_().register_hook(calls.append)
    tbptt = TBPTT(lstm_cell(), torch.nn.functional.mse_loss, 12, 12, strategy="uniform:4")
    tbptt.train(TensorSequence(inputs, targets))
    assert len(calls) == 3
