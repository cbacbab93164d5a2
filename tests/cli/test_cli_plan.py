"""`tbptt-ckpt plan`: what it takes, what it prints, and how it refuses."""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tbptt_ckpt import Costs, Plan, plan, simulate
from tbptt_ckpt.cli.app import main
from tbptt_ckpt.cli.plan.drawing import COLUMNS, LABEL, draw_plan
from tbptt_ckpt.cli.terminal import format_seconds
from tbptt_ckpt.memory.available import free_memory
from tbptt_ckpt.planner.ladder import (
    MOST_PLANNED,
    budget_ladder,
    farthest_reach,
    longest_windows,
    reach_ladder,
)

BY_HAND = ["--state-bytes", "64KiB", "--step-bytes", "230KB"]


def run_json(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    assert main(["plan", *options, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_json_holds_the_plan_and_the_costs_it_was_made_from(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = run_json(capsys, "--steps", "500", "--budget", "3MiB", *BY_HAND)
    costs = Costs.from_dict(found["costs"])
    expected = plan(500, costs, budget_bytes=3 << 20)
    fields = {"strategy", "first", "lead_steps", "blocks", "advance_steps"}
    fields |= {"predicted_peak_bytes", "predicted_seconds"}
    assert Plan.from_dict({key: found["plan"][key] for key in fields}) == expected
    simulation = simulate(expected.schedule, costs, advance_steps=expected.advance_steps)
    assert found["plan"]["predicted_peak_bytes"] == simulation.peak_bytes <= 3 << 20
    assert found["plan"]["executed_steps"] == simulation.executed_steps
    assert found["plan"]["num_leaves"] == simulation.num_leaves
    assert found["retained"]["predicted_peak_bytes"] == 500 * 230_000


def test_the_table_of_budgets_runs_from_few_extra_forwards_to_keeping_everything(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = run_json(capsys, "--steps", "500", *BY_HAND)["budgets"]
    budgets = [row["budget_bytes"] for row in rows]
    assert budgets == sorted(budgets)
    assert budgets[0] >= (64 << 10) + 230_000
    assert rows[0]["executed_steps_per_step"] <= 9
    assert budgets[-1] == 500 * 230_000
    assert rows[-1]["over_retained"] == 1.0
    assert rows[-1]["executed_steps_per_step"] == 1.0
    for before, row in pairwise(rows):
        saved = before["predicted_seconds"] - row["predicted_seconds"]
        mib = (row["budget_bytes"] - before["budget_bytes"]) / 2**20
        assert saved >= 0
        assert row["saved_seconds_per_mib"] == pytest.approx(saved / mib)
        assert row["predicted_peak_bytes"] <= row["budget_bytes"]


def test_the_ladder_has_as_many_rungs_as_asked_for() -> None:
    costs = Costs.linear(state_bytes=5, step_bytes=10)
    assert len(budget_ladder(300, costs, count=6)) == 6
    for before, rung in pairwise(budget_ladder(5000, costs)):
        assert rung.budget_bytes > before.budget_bytes
        assert rung.plan.predicted_seconds < before.plan.predicted_seconds  # each buys time
    assert len(budget_ladder(1, costs, count=6)) == 1  # one step: nothing to choose


@pytest.mark.parametrize("states", [0, 1, 2, 5, 9])
@pytest.mark.parametrize("levels", [0, 1, 2, 3])
def test_the_farthest_reach_is_that_of_revolve(states: int, levels: int) -> None:
    """Leaves of one step beside `states` states: Griewank & Walther's binomial coefficient."""
    costs = Costs.linear(state_bytes=1, step_bytes=1000)
    expected = math.comb(states + levels, levels) if states else 1
    found = farthest_reach(1000 + states, costs, levels)
    assert found == (expected if expected < 1000 else expected // 10 * 10)


@pytest.mark.parametrize("levels", [0, 1, 2])
@pytest.mark.parametrize("budget", [2_000, 9_000, 31_000])
def test_no_step_runs_more_often_up_to_the_farthest_reach(levels: int, budget: int) -> None:
    costs = Costs.linear(state_bytes=100, step_bytes=300, call_seconds=1e-9)
    farthest = farthest_reach(budget, costs, levels)
    within, beyond = (plan(n, costs, budget_bytes=budget) for n in (farthest, farthest + 10))
    assert within.executed_steps <= 1.01 * (1 + levels) * within.num_steps
    assert beyond.executed_steps > within.executed_steps + 10 * (levels or 0)


def test_reaches_hold_the_budget_and_the_three_longest_are_marked() -> None:
    costs = Costs.linear(state_bytes=64 << 10, step_bytes=230_000)
    longest = longest_windows(8 << 20, costs)
    reaches = list(reach_ladder(8 << 20, costs, longest))
    steps = [reach.plan.num_steps for reach in reaches]
    assert steps == sorted(set(steps))
    assert steps[-1] == farthest_reach(8 << 20, costs, 2)
    marked = {reach.levels: reach for reach in reaches if reach.levels is not None}
    assert {levels: reach.plan.num_steps for levels, reach in marked.items()} == longest
    assert sorted(longest) == [0, 1, 2]
    for reach in reaches:
        assert reach.plan.predicted_peak_bytes <= 8 << 20
        assert reach.retained == plan(reach.plan.num_steps, costs, strategy="retain")
        fits = reach.retained.predicted_peak_bytes <= 8 << 20
        assert fits == (reach.plan.num_steps <= marked[0].plan.num_steps)
        full = plan(reach.plan.num_steps, costs, budget_bytes=8 << 20).predicted_seconds
        assert reach.plan.predicted_seconds == pytest.approx(full, rel=0.02)


def test_longest_windows_that_are_too_long_to_plan_are_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    by_hand = ["--state-bytes", "1KiB", "--step-bytes", "6000"]
    assert main(["plan", "--budget", "8MiB", *by_hand]) == 0
    printed = capsys.readouterr().out
    found = run_json(capsys, "--budget", "8MiB", *by_hand)["reaches"][0]
    assert found["rows"][-1]["k2"] == MOST_PLANNED
    assert [row["longest_at_extra_forwards"] for row in found["rows"]].count(None) > 1
    longest = {int(levels): steps for levels, steps in found["longest_by_extra_forwards"].items()}
    assert longest[1] < MOST_PLANNED < longest[2]
    assert any(line.rstrip().endswith("longest, 1 extra") for line in printed.splitlines())
    assert f"longest, 2 extra: {longest[2]:,} steps, too many" in printed


@pytest.mark.parametrize("columns", ["80", "100"])
def test_without_steps_a_table_says_how_far_back_fits(
    columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert main(["plan", "--budget", "8MiB,16M", *BY_HAND]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= int(columns)
    assert sum("How far back within" in line for line in lines) == 2
    for words in ("plain", "1 extra", "2 extra"):
        assert sum(line.rstrip().endswith(f"longest, {words}") for line in lines) == 2, words
    found = run_json(capsys, "--budget", "8MiB,16M", *BY_HAND)
    assert [table["budget_bytes"] for table in found["reaches"]] == [8 << 20, 16 << 20]
    for table in found["reaches"]:
        for row in table["rows"]:
            assert row["predicted_peak_bytes"] <= table["budget_bytes"]
            assert f"{row['k2']:,} " in "\n".join(lines)


def test_no_budget_of_a_very_long_window_is_shown_that_runs_its_steps_without_end() -> None:
    costs = Costs.linear(state_bytes=64 << 10, step_bytes=230_000)
    rungs = budget_ladder(1_000_000, costs, count=3)
    assert rungs[0].plan.executed_steps <= 9_000_000
    assert rungs[-1].plan.executed_steps == 1_000_000


def test_a_part_of_the_free_memory_is_a_budget(capsys: pytest.CaptureFixture[str]) -> None:
    half = run_json(capsys, "--budget", "0.0001", *BY_HAND)["reaches"][0]
    assert half["budget_bytes"] == pytest.approx(1e-4 * free_memory(), rel=0.3)


@pytest.mark.parametrize("budget", ["400KB", "1MiB", "3MiB", "40MiB", "1GiB"])
@pytest.mark.parametrize("steps", ["1", "40", "1000"])
def test_tables_and_drawing_fit_a_terminal_of_80_columns(
    steps: str, budget: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["plan", "--steps", steps, "--budget", budget, *BY_HAND]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for name in ("predicted peak", "executed steps per step", "over everything retained"):
        assert name in text
    assert "What more memory buys" in text


def test_the_drawing_shows_leaves_from_the_last_to_the_first() -> None:
    costs = Costs.linear(state_bytes=10, step_bytes=10)
    drawn = draw_plan(plan(66, costs, strategy="uniform:11"), costs)
    text = [line[LABEL:].ljust(COLUMNS) for line in drawn]
    assert text[1] == ("=" * 55).ljust(COLUMNS)  # all but the last leaf are advanced once
    assert text[2] == ("|" + "_" * 10) * 6
    rows = text[3:]
    assert all(row[55:] == " " * 11 for row in rows if "-" in row and "#" not in row)
    ends = [row.rindex("#") for row in rows if "#" in row]
    assert ends == sorted(ends, reverse=True)
    assert ends[0] == 65
    assert ends[-1] == 10


def test_a_plan_of_too_many_actions_is_not_drawn() -> None:
    costs = Costs.linear(state_bytes=1, step_bytes=1)
    assert draw_plan(plan(1_000_000, costs, strategy="step"), costs) == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (0.000012, "12.0 us"), (0.0999, "99.9 ms"), (4.567, "4.57 s"), (7200, "2.00 h")],
)
def test_seconds_are_written_for_people(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_costs_are_read_back_from_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run_json(capsys, "--steps", "300", "--budget", "2MiB", *BY_HAND)
    whole, alone = tmp_path / "whole.json", tmp_path / "alone.json"
    whole.write_text(json.dumps(first))
    alone.write_text(json.dumps(first["costs"]))
    for path in (whole, alone):
        again = run_json(capsys, "--steps", "300", "--budget", "2MiB", "--costs", str(path))
        assert again["plan"] == first["plan"]


@pytest.mark.parametrize("model", ["lstm", "lstmcell"])
def test_a_model_is_measured(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", model, "--hidden", "16", "--lanes", "2", "--steps", "200"]
    found = run_json(capsys, *options, "--budget", "4MiB")
    assert found["plan"]["predicted_peak_bytes"] <= 4 << 20
    # Two tensors of 2 lanes x 16 units in float32.
    assert found["costs"]["state_bytes"] == 2 * 2 * 16 * 4
    assert found["costs"]["fixed"]["optimizer"] > 0
    assert "measured on" in found["what"]


def test_a_plan_says_in_which_form_steps_run(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "lstmcell", "--hidden", "16", "--lanes", "2", "--steps", "200"]
    found = run_json(capsys, *options)["plan"]
    weighed = dict(found["forms"])
    assert found["form"] == min(weighed, key=weighed.__getitem__)
    assert weighed[found["form"]] == found["predicted_seconds"]
    assert main(["plan", *options]) == 0
    assert re.search(r"form +steps \w+ \(predicted: ", capsys.readouterr().out)
    fixed = run_json(capsys, *options, "--strategy", "sqrt")["plan"]  # as training under it does
    assert (fixed["form"], fixed["forms"]) == ("auto", [])


REFUSED: list[tuple[list[str], str]] = [
    (["--steps", "0"], "--steps"),
    (["--steps", "ten"], "--steps"),
    (["--budget", "much", *BY_HAND], "--budget='much'"),
    (["--steps", "9", "--budget", "200KB", *BY_HAND], "295,536 bytes"),
    (["--budget", "200KB", *BY_HAND], "--budget 200KB: not even one step fits"),
    (["--steps", "9", "--budget", "1M,2M", *BY_HAND], "for one --budget"),
    (["--steps", "9", "--plot", "a.png", *BY_HAND], "leave --steps out"),
    (["--plot", "a.jpg", *BY_HAND], "must end in .png or .svg"),
    (["--budget", "0", *BY_HAND], "--budget='0' must be at least one byte"),
    (["--state-bytes", "5"], "--step-bytes"),
    (["--model", "lstm", *BY_HAND], "--model and --state-bytes"),
    (["--model", "nothing"], "--model nothing"),
    (["--costs", "no/such/file"], "no/such/file"),
    (["--steps", "9", "--strategy", "fastest", *BY_HAND], "fastest"),
    (["--step-seconds", "-1", *BY_HAND], "--step-seconds"),
    (["--dtype", "int8"], "--dtype"),
    (["--steps", "99", "--strategy", "retain", "--budget", "1MiB", *BY_HAND], "'retain' needs"),
]


@pytest.mark.parametrize(("options", "named"), REFUSED)
def test_what_cannot_work_is_refused_in_one_line(
    options: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert named in captured.err


@pytest.mark.parametrize("text", ["{", "[]", '{"costs": {"colour": 1}}'])
def test_a_file_without_costs_is_refused(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "costs.json"
    path.write_text(text)
    assert main(["plan", "--costs", str(path)]) == 2
    assert "costs" in capsys.readouterr().err
