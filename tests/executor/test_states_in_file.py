"""States in a file: the same bits, nothing left behind, and one error where it cannot be."""

from __future__ import annotations

import copy
import errno
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import naive
import pytest
import torch
from cases import (
    OVERLAPS,
    STRATEGIES,
    bitwise,
    gradients,
    lstm,
    lstm_cell,
    mean_loss,
    naive_problem,
    random_data,
    random_state,
    relative_error,
    tanh_cell,
)
from models_for_tests import Grid
from planned_costs import check_prediction, random_costs, random_window
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, ArgumentError, TensorSequence, Trainer, plan, run_window
from tbptt_ckpt.budget.stored_states import with_stored_states
from tbptt_ckpt.errors import TbpttError
from tbptt_ckpt.executor import ReplayExecutor
from tbptt_ckpt.executor.kept_states import Folder
from tbptt_ckpt.executor.storage import Storage
from tbptt_ckpt.module.trees import tensors_of

NUM_STEPS = 13
SOME = ("step", "uniform:3", "revolve:2")


class Mixed(NamedTuple):
    hidden: Tensor
    turned: Tensor
    count: Tensor


class MixedState(nn.Module):
    """A state of several dtypes, one tensor in another order, a number, and a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.drop = nn.Linear(5, 3), nn.Dropout(0.3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        given, number = state
        joined = torch.cat([x, given.hidden + given.turned.real.T], 1)
        hidden = self.drop(torch.tanh(self.inner(joined)))
        self.seen = self.seen + 1
        turned = torch.complex(0.5 * hidden, hidden).T
        return hidden, (Mixed(hidden, turned, given.count + 1), number)


def mixed_state() -> Any:
    zeros = torch.zeros(2, 3, dtype=torch.float64)
    return Mixed(zeros, torch.complex(zeros, zeros).T, torch.zeros(2, dtype=torch.int64)), 7


MODULES: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "tanh": lambda: (tanh_cell(), random_state()),
    "lstm_cell": lambda: (lstm_cell(), None),
    "lstm": lambda: (lstm(), None),
    "mixed": lambda: (MixedState().double(), mixed_state()),
}


def trained(executor: Any, name: str, **options: Any) -> list[Tensor]:
    """What every window gave, and the weights after all."""
    torch.manual_seed(3)
    module, state = MODULES[name]()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    tbptt = TBPTT(module, mean_loss, 3, 7, optimizer, executor=executor, **options)
    found = []
    for window in tbptt.windows(TensorSequence(*random_data(NUM_STEPS)), state):
        found.append((window.loss, window.state, gradients([*module.parameters()])))
    return tensors_of(([p.detach() for p in module.parameters()], found))


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("name", MODULES)
def test_every_bit_is_as_in_memory(tmp_path: Path, name: str, overlap: str) -> None:
    before = open_files()
    for strategy in SOME:
        how = {"strategy": strategy, "overlap": overlap}
        expected = trained("replay", name, **how)
        assert bitwise(trained(ReplayExecutor(tmp_path), name, **how), expected), strategy
    assert open_files() == before
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_are_those_of_a_plain_loop(tmp_path: Path, strategy: str) -> None:
    module, (inputs, targets), state = tanh_cell(), random_data(NUM_STEPS), random_state()
    problem = naive_problem(copy.deepcopy(module), inputs, targets, state)
    windows = naive.refresh(problem, 3, 7, loss="new", reduction="mean")
    tbptt = TBPTT(module, mean_loss, 3, 7, executor=ReplayExecutor(tmp_path), strategy=strategy)
    for expected, _ in zip(
        windows, tbptt.windows(TensorSequence(inputs, targets), state), strict=True
    ):
        assert relative_error(gradients([*module.parameters()]), expected.grads) <= 1e-12
        module.zero_grad()


def test_a_file_of_short_writes_and_reads_holds_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, read = os.pwrite, os.preadv
    expected = trained("replay", "lstm_cell", strategy="sqrt")
    monkeypatch.setattr(os, "pwrite", lambda file, rest, at: write(file, rest[:5], at))
    monkeypatch.setattr(os, "preadv", lambda file, rest, at: read(file, [rest[0][:3]], at))
    assert bitwise(trained(ReplayExecutor(tmp_path), "lstm_cell", strategy="sqrt"), expected)


@pytest.mark.parametrize("call", ["pwrite", "preadv"])
@pytest.mark.parametrize("at", [0, 1, 4])
def test_a_disk_that_fails_is_one_error_and_leaves_all_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, at: int
) -> None:
    module, data = tanh_cell(), TensorSequence(*random_data(NUM_STEPS))
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    executor = ReplayExecutor(tmp_path)
    tbptt = TBPTT(module, mean_loss, NUM_STEPS, None, optimizer, strategy="step", executor=executor)
    weights, files, calls = [p.detach().clone() for p in module.parameters()], open_files(), []
    real = getattr(os, call)

    def fails(*given: Any) -> int:
        calls.append(given)
        if len(calls) > at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(real(*given))

    monkeypatch.setattr(os, call, fails)
    words = "disk is full" if call == "pwrite" else "reading failed"
    with pytest.raises(TbpttError, match=f"{tmp_path}.*{words}.*No space left"):
        tbptt.train(data, random_state())
    assert len(calls) == at + 1
    assert bitwise([*module.parameters()], weights)
    assert all(p.grad is None for p in module.parameters())
    assert (open_files(), [*tmp_path.iterdir()]) == (files, [])
    monkeypatch.setattr(os, call, real)
    tbptt.train(data, random_state())  # and goes on


def test_an_error_of_the_module_leaves_no_file(tmp_path: Path) -> None:
    class Breaks(nn.RNNCell):
        calls = 0

        def forward(self, x: Tensor, h: Any = None) -> Tensor:
            self.calls += 1
            if self.calls > 20:
                raise RuntimeError("broken")
            return super().forward(x, h)

    files, inputs = open_files(), torch.randn(20, 2, 3)
    with pytest.raises(RuntimeError, match="broken"):
        run_window(
            Breaks(3, 3),
            mean_loss,
            inputs,
            inputs,
            strategy="step",
            executor=ReplayExecutor(tmp_path),
        )
    assert (open_files(), [*tmp_path.iterdir()]) == (files, [])


def test_a_folder_that_takes_no_file_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "absent", tmp_path / "file", Path("/proc")):
        with pytest.raises(ArgumentError, match=f"offload='{folder}' must be a folder"):
            ReplayExecutor(folder)
    executor = ReplayExecutor(str(tmp_path))
    (tmp_path / "file").unlink()
    tmp_path.rmdir()
    with pytest.raises(TbpttError, match="no file could be made there"):
        trained(executor, "tanh", strategy="step")


class Tagged(Tensor):
    """A tensor of another kind, whose bytes are not all that it is."""


def test_a_state_that_is_no_dense_tensor_is_refused(tmp_path: Path) -> None:
    def step(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return x * state, torch.tanh(state + x)

    inputs, state = torch.randn(6, 2), torch.zeros(2).as_subclass(Tagged)
    how: Any = {"strategy": "step", "executor": ReplayExecutor(tmp_path)}
    with pytest.raises(ArgumentError, match=r"a Tagged .*, and only dense tensors are kept"):
        run_window(step, mean_loss, inputs, inputs, state, **how)


def test_predictions_are_what_the_simulator_counts(tmp_path: Path) -> None:
    """With states in a file a plan of one level does, whatever a state takes."""
    rng, storage = random.Random(7), Storage(Folder(tmp_path))
    for _ in range(12):
        costs = with_stored_states(storage, random_costs(rng), torch.device("cpu"))
        num_steps = rng.choice([9, 50, 700])
        window = random_window(rng, num_steps)
        smallest = plan(num_steps, costs, strategy="step", **window).predicted_peak_bytes
        for budget in (smallest, 2 * smallest, None):
            planned = plan(num_steps, costs, budget_bytes=budget, **window)
            check_prediction(planned, costs, budget, window)
            lead = window.get("new_steps", num_steps) - num_steps
            assert planned.executed_steps <= 2 * num_steps + max(0, lead)


def test_a_budget_holds_that_the_states_alone_exceed(tmp_path: Path) -> None:
    module, state = Grid(), torch.randn(4, 4096)
    data = TensorSequence(torch.randn(64, 4, 1), torch.randn(64, 4, 1))
    budget, found = 14 * state.nbytes, {}
    for executor in ("replay", ReplayExecutor(tmp_path)):
        module.zero_grad()
        how = {"memory_budget": budget, "measure_memory": True, "executor": executor}
        (window,) = TBPTT(module, mean_loss, 64, None, **how).windows(data, state)
        assert window.peak_bytes is not None
        assert window.peak_bytes <= budget
        found[executor] = window.plan.executed_steps, module.speed.grad.clone()
    (in_memory, expected), (in_file, grad) = found.values()
    assert in_file <= 2 * 64 < in_memory  # once more each, against levels of few states
    assert relative_error([grad], [expected]) <= 1e-5


def test_a_resumed_run_has_the_same_bits_and_plans(tmp_path: Path) -> None:
    def trainer() -> tuple[nn.Module, Trainer]:
        module, _ = MODULES["lstm_cell"]()
        optimizer = torch.optim.Adam(module.parameters(), 0.01)
        how = {"executor": ReplayExecutor(tmp_path), "memory_budget": "40KiB"}
        tbptt = TBPTT(module, mean_loss, 10, 30, optimizer, strategy="optimal", **how)
        return module, Trainer(tbptt, TensorSequence(*random_data(80)))

    module, whole = trainer()
    windows = whole.windows()
    for _ in range(4):
        next(windows)
    saved = copy.deepcopy(whole.state_dict())
    rest = [(w.loss, w.plan) for w in windows]
    resumed_module, resumed = trainer()
    resumed.load_state_dict(saved)
    assert [str(w.plan) for w in resumed.windows()] == [str(plan) for _, plan in rest]
    assert bitwise([*resumed_module.parameters()], [*module.parameters()])
    assert [*tmp_path.iterdir()] == []
