"""Each limit of `docs/limitations.md` names a test; those that stand nowhere else stand here."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cases import lstm, lstm_cell, random_data, tanh_cell
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, InfeasibleBudgetError, TensorSequence, evaluate, peak_memory
from tbptt_ckpt.executor.additivity import MeanCheck
from tbptt_ckpt.memory.storages import tensor_bytes

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


class Running(nn.Module):
    """A step whose buffer follows what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        h = 0.0 if h is None else h
        h = torch.tanh(x.mean(-1, keepdim=True) * self.weight + self.mean + h)
        self.mean = 0.5 * self.mean + 0.5 * h.detach().mean()
        self.steps = self.steps + 1
        return h, h


def test_a_plain_function_hides_buffers() -> None:
    seen, hidden = Running(), Running()
    for module in (seen, lambda x, h: hidden(x, h)):
        tbptt = TBPTT(module, half_a_mean, 6, 6, strategy="uniform:2", check_replays=False)
        tbptt.train(TensorSequence(*one_output(6)))
    assert seen.steps == 6
    assert hidden.steps > 6


def test_modules_in_a_long_plain_list() -> None:
    class Listed(nn.Module):
        def __init__(self, length: int) -> None:
            super().__init__()
            self.inner = Running()
            self.all = [self.inner] * length
            self.weight = self._modules.pop("inner").weight

        def forward(self, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
            return self.all[0](x, h)

    for length, is_found in ((10, True), (1001, False)):
        module = Listed(length)
        tbptt = TBPTT(module, half_a_mean, 6, 6, strategy="uniform:2", check_replays=False)
        tbptt.train(TensorSequence(*one_output(6)))
        assert bool(module.all[0].steps == 6) is is_found


def test_the_short_last_window_of_a_stream_finds_later_buffers() -> None:
    losses = {}
    for kind in ("sequence", "stream"):
        module, (inputs, targets) = Running(), one_output(7)
        source = TensorSequence(inputs, targets) if kind == "sequence" else Steps(inputs, targets)
        optimizer = torch.optim.SGD([module.weight], 3.0)
        tbptt = TBPTT(module, half_a_mean, 2, 4, optimizer, strategy="uniform:2")
        losses[kind] = [float(window.loss) for window in tbptt.windows(source)]
    assert losses["sequence"][:3] == losses["stream"][:3]
    assert losses["sequence"][3] != losses["stream"][3]


class Steps:
    def __init__(self, *data: Tensor) -> None:
        self._data = data

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return zip(*self._data, strict=True)


def one_output(num_steps: int) -> tuple[Tensor, Tensor]:
    inputs, targets = random_data(num_steps)
    return inputs, targets[..., :1]


def test_later_steps_that_take_more_exceed_a_budget() -> None:
    class Heavier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.RNNCell(8, 64)

        def forward(self, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
            y = h = self.cell(x, h)
            for _ in range(40 if x[0, 0] > 0 else 0):
                y = torch.tanh(y)
            return y, h

    inputs, budget = -torch.rand(120, 8, 8), 400_000
    inputs[80:] *= -1
    data = TensorSequence(inputs, torch.zeros(120, 8, 64))
    asked = {"memory_budget": budget, "measure_memory": True}
    tbptt = TBPTT(Heavier(), torch.nn.functional.mse_loss, 40, 40, **asked)
    peaks = [window.peak_bytes for window in tbptt.windows(data)]
    assert max(peaks[:2]) <= budget < peaks[2]


def test_the_first_leaf_that_takes_far_more_exceeds_a_budget_while_it_is_measured() -> None:
    class Jumping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.weight = nn.RNN(8, 16), nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
            y, h = self.rnn(x, h)
            if len(x) > 60:  # as kernels that take a buffer for so many rows
                y = y * torch.tanh(self.weight.expand(50_000)).mean()
            return y, h

    data, budget = TensorSequence(torch.rand(200, 8, 8), torch.rand(200, 8, 16)), 500_000
    asked = {"memory_budget": budget, "strategy": "uniform:100", "per_step": False}
    tbptt = TBPTT(Jumping(), torch.nn.functional.mse_loss, 200, 200, **asked)
    with peak_memory(rss=False) as meter, pytest.raises(InfeasibleBudgetError) as refused:
        tbptt.train(data)
    held = tensor_bytes(tbptt.parts.parameters, data.inputs, data.targets)
    assert budget < held + meter.peak_bytes <= refused.value.smallest_budget_bytes
