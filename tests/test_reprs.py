"""Public objects say in one line what they are; no tensor buries the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
import torch

from tbptt_ckpt import (
    TBPTT,
    ArraySequence,
    BurnIn,
    LaneSource,
    Snapshots,
    TensorSequence,
    Trainer,
    Uniform,
    evaluate,
    run_window,
    simulate,
    verify,
)
from tbptt_ckpt.profiling import MemoryReport, StrategyReport
from tbptt_ckpt.schedule import Costs
from tbptt_ckpt.schedule.plan import plan_window

X, Y = torch.zeros(1200, 4, 3), torch.zeros(1200, 4, dtype=torch.int64)
ROWS = np.zeros((1201, 2), np.float32)
PLAN = plan_window(Uniform(4), 0, 3, 13)
COSTS = Costs.linear(state_bytes=10, step_bytes=5)

# Of sources, plans and reports, the whole line.
LINES: dict[str, tuple[Any, str]] = {
    "tensors": (
        TensorSequence(X, Y),
        "TensorSequence(1,200 steps of float32 [1200, 4, 3], targets int64 [1200, 4])",
    ),
    "tensors with all there is": (
        TensorSequence(
            (X[..., 0].T, X[..., 1].T),
            time_dim=1,
            resets=torch.zeros(1200, 4, dtype=torch.bool),
        ),
        "TensorSequence(1,200 steps of 2 tensors, time_dim=1, resets)",
    ),
    "arrays": (
        ArraySequence(ROWS, np.zeros(1201, np.int64)),
        "ArraySequence(1,201 steps of float32 [1201, 2], targets int64 [1201])",
    ),
    "arrays of next steps": (
        ArraySequence(ROWS, next_step=True),
        "ArraySequence(1,200 steps of float32 [1201, 2], targets the next step)",
    ),
    "lanes": (
        LaneSource([TensorSequence(X[:n, 0], Y[:n, 0]) for n in (2, 3, 4)], 2, seed=7),
        "LaneSource(3 sequences in 2 lanes, 5 steps, shuffled by seed 7)",
    ),
    "burn-in": (
        BurnIn(LaneSource(TensorSequence(X[:, 0], Y[:, 0]), 3), 20),
        "BurnIn(LaneSource(3 sequences in 3 lanes, 400 steps, in order), 20 steps without loss)",
    ),
    "a plan": (PLAN, f"Plan({PLAN})"),
    "reports": (
        StrategyReport(tuple(MemoryReport(strategy=s, k1=1, k2=1) for s in ("plain", "sqrt"))),
        "StrategyReport(2 rows: plain, sqrt)",
    ),
}


@pytest.mark.parametrize(("item", "line"), LINES.values(), ids=LINES)
def test_one_line_says_it_all(item: Any, line: str) -> None:
    assert repr(item) == line


def test_weights_are_named() -> None:
    source = TensorSequence(X, Y, weight=torch.ones(1200))
    assert repr(source).endswith("targets int64 [1200, 4], weight)")


def results() -> dict[str, Any]:
    module, (inputs, targets) = cases.tanh_cell(), cases.random_data(13)
    state = cases.random_state()
    data, loss = TensorSequence(inputs, targets), cases.mean_loss
    tbptt = TBPTT(module, loss, 3, 7, torch.optim.SGD(module.parameters(), 0.1))
    return {
        "WindowResult(index=0, start=0": next(iter(tbptt.windows(data, state))),
        "TrainResult(loss=": tbptt.train(data, state),
        "WindowResult(index=0, start=0, new_start=0, stop=13": run_window(
            module, loss, inputs, targets, state
        ),
        "Evaluation(loss=": evaluate(module, loss, data, state),
        "Verification(13 steps, strategy auto": verify(module, loss, inputs, targets, state),
        "Simulation(peak_bytes=": simulate(PLAN.schedule, COSTS),
    }


def test_results_are_one_line_without_states() -> None:
    for beginning, result in results().items():
        line = repr(result)
        assert line.startswith(beginning), line
        assert "\n" not in line
        assert len(line) < 500
        assert "state=" not in line
        assert "timeline" not in line


def test_a_trainer_says_how_far_it_is(tmp_path: Path) -> None:
    module = cases.tanh_cell()
    tbptt = TBPTT(module, cases.mean_loss, 3, 7, torch.optim.SGD(module.parameters(), 0.1))
    data = TensorSequence(*cases.random_data(600))
    trainer = Trainer(tbptt, data, epochs=10, snapshots=Snapshots(directory=tmp_path))
    assert repr(trainer) == f"Trainer(0 of 10 epochs, 0 steps, snapshots in {tmp_path})"
    for _ in trainer.windows():
        if trainer.num_steps == 1_203:
            break
    assert repr(trainer) == f"Trainer(2 of 10 epochs, 1,203 steps, snapshots in {tmp_path})"
    bounded = Trainer(tbptt, data, epochs=None, max_steps=9_000)
    assert repr(bounded) == "Trainer(0 epochs, 0 of 9,000 steps)"
