"""Where states lie elsewhere, profiles, `measure_costs` and commands say what that takes."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import mean_loss
from command_lines import outcome_of, refusal_of
from models_for_tests import Grid

from tbptt_ckpt import measure_costs, plan, profile_strategies, profile_window
from tbptt_ckpt.cli.app import main
from tbptt_ckpt.cli.profile.config import ProfileConfig
from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.executor import ReplayExecutor
from tbptt_ckpt.profiling.configuration import Configuration
from tbptt_ckpt.profiling.report import MemoryReport
from tbptt_ckpt.schedule import Costs
from tbptt_ckpt.schedule.curves import Curve

LANES, SIDE, STEPS = 4, 2048, 48


def job(**options: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(2, 2 * STEPS, LANES, 1, generator=generator)
    state = torch.randn(LANES, SIDE, generator=generator)
    given = {"inputs": inputs, "targets": targets, "init_state": state}
    return {"module": Grid(), "loss_fn": mean_loss, **given, **options}


STATE_BYTES = LANES * SIDE * 4


def test_a_profile_says_what_a_state_takes_and_how_long(tmp_path: Path) -> None:
    report = profiled(ReplayExecutor(tmp_path), strategy="uniform:4", memory_budget=None)
    assert report.kept_state_bytes == 0
    assert report.store_seconds > 0
    assert abs(report.prediction_error) < 0.1


def profiled(executor: Any, **options: Any) -> MemoryReport:
    windows = {"k1": STEPS, "k2": STEPS, "repeats": 1, "trace": False, **options}
    report = profile_window(**job(**windows, executor=executor))
    assert report.is_ok, report.message
    assert report.executor == str(executor)
    return report


@pytest.mark.exhaustive
def test_every_profile_says_it_and_plans_by_it(tmp_path: Path) -> None:
    found = {}
    for executor in (
        "replay",
        ReplayExecutor(tmp_path),
        ReplayExecutor(state_dtype=torch.bfloat16),
    ):
        report = profiled(executor, memory_budget=16 * STATE_BYTES)
        assert report.peak_bytes <= 16 * STATE_BYTES
        assert abs(report.prediction_error) < 0.1
        found[str(executor)] = report
    in_memory, in_file, rounded = found.values()
    assert (in_memory.kept_state_bytes, in_memory.store_seconds) == (STATE_BYTES, 0.0)
    assert in_file.kept_state_bytes == 0
    assert in_file.store_seconds > 0
    assert (rounded.kept_state_bytes, rounded.store_seconds) == (STATE_BYTES // 2, 0.0)
    assert in_file.executed_steps <= 2 * STEPS < in_memory.executed_steps


@pytest.mark.exhaustive
def test_the_table_of_strategies_says_it_too(tmp_path: Path) -> None:
    report = profile_strategies(
        **job(k1=8, k2=16, strategies=("sqrt",), executor=ReplayExecutor(tmp_path), repeats=1)
    )
    text = " ".join(report.table(width=400).split())
    assert f"executor replay, with states in {tmp_path}" in text
    assert "a kept state takes 0 B of it, and " in text
    assert " ms to be written elsewhere and read again" in text
    plain = json.loads(report.to_json())["rows"][1]
    assert plain["store_seconds"] > 0


@pytest.mark.exhaustive
def test_in_processes_of_their_own(tmp_path: Path) -> None:
    windows = {"k1": 8, "k2": 16, "strategies": ("sqrt",), "repeats": 1, "fresh_processes": True}
    report = profile_strategies(**job(**windows, executor=ReplayExecutor(tmp_path)))
    assert [row.status for row in report.rows] == ["ok", "ok"]
    assert report.rows[1].store_seconds > 0


def test_an_executor_is_sent_to_another_process(tmp_path: Path) -> None:
    for executor in (ReplayExecutor(tmp_path, torch.bfloat16), ReplayExecutor("host")):
        row = Configuration(strategy="sqrt", k1=4, k2=12, executor=executor)
        assert str(pickle.loads(pickle.dumps(row)).executor) == str(executor)


def test_measured_costs_are_of_states_as_they_are_stored(tmp_path: Path) -> None:
    given = job()
    costs = {
        name: measure_costs(**given, executor=executor, max_seconds=0.1)
        for name, executor in {
            "memory": "replay",
            "file": ReplayExecutor(tmp_path),
            "rounded": ReplayExecutor(state_dtype=torch.bfloat16),
            "host": ReplayExecutor("host"),  # which is where a CPU has them already
        }.items()
    }
    assert costs["memory"].kept_bytes is None
    assert costs["host"].kept_bytes is None
    assert (costs["file"].kept_bytes, costs["rounded"].kept_bytes) == (0, STATE_BYTES // 2)
    assert costs["file"].store_seconds > 0
    assert {costs[name].store_seconds for name in ("memory", "rounded", "host")} == {0.0}
    assert Costs.from_dict(costs["file"].to_dict()) == costs["file"]
    in_file = replace(  # measured bytes; a busy machine's seconds would make other plans
        costs["file"],
        advance_seconds=Curve.linear(0.0, 1e-3),
        leaf_seconds=Curve.linear(1e-4, 2e-3),
        store_seconds=1e-4,
    )
    one_by_one = plan(STEPS, in_file, strategy="step")
    fastest = plan(STEPS, in_file, budget_bytes=one_by_one.predicted_peak_bytes)
    assert fastest.executed_steps <= 2 * STEPS
    free = plan(STEPS, replace(in_file, store_seconds=0.0))
    assert free.predicted_seconds < one_by_one.predicted_seconds
    with pytest.raises(ArgumentError, match="executor='checkpoint' must be"):
        measure_costs(**given, executor="checkpoint")


MODEL = """
import torch
from torch import nn
from tbptt_ckpt import Workload


def make():
    torch.manual_seed(0)
    inputs, targets = torch.randn(64, 4, 8), torch.randn(64, 4, 64)
    return Workload(nn.LSTM(8, 64), nn.MSELoss(), inputs=inputs, targets=targets)
"""


@pytest.mark.exhaustive
def test_a_plan_of_a_measured_model_counts_it(capsys: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODEL)
    words = ["plan", "--model", f"{tmp_path}/mine.py:make", "--steps", "64"]
    in_file = outcome_of(capsys, [*words, "--offload", str(tmp_path)])["costs"]
    assert (in_file["kept_bytes"], in_file["store_seconds"] > 0) == (0, True)


def test_plans_of_a_command_count_it(capsys: Any, tmp_path: Path) -> None:
    by_hand = ["plan", "--steps", "100", "--state-bytes", "1MiB", "--step-bytes", "1MiB"]
    budget = ["--budget", "8MiB"]
    plans = [
        outcome_of(capsys, [*by_hand, *budget, *more])["plan"]
        for more in ([], ["--offload", str(tmp_path)])
    ]
    assert plans[1]["executed_steps"] <= 200 < plans[0]["executed_steps"]
    assert main([*by_hand, "--offload", str(tmp_path)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "each of them 0 B of memory, " in text
    assert " there and back" in text
    message = refusal_of(capsys, [*by_hand, "--offload", str(tmp_path / "absent")])
    assert "absent' must be a folder" in message
    message = refusal_of(capsys, [*by_hand, "--state-dtype", "bfloat16"])
    assert "--state-dtype would change nothing: costs do not say how wide" in message


def test_a_profile_by_a_command(capsys: Any, tmp_path: Path) -> None:
    words = ["profile", "--offload", str(tmp_path), "--executor", "checkpoint"]
    assert "needs --executor replay" in refusal_of(capsys, words)
    stored = {"offload": "host", "state_dtype": "bfloat16"}
    config = ProfileConfig(**stored, k1=(4,), k2=(8,), device="cpu")
    executors = {str(row.executor) for row in config.configurations()}
    assert executors == {"replay, with states in the host's memory in bfloat16"}
