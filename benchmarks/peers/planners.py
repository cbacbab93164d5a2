"""The planner alone: executed steps and planning time against checkpoint_schedules."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from benchmarks.peers.campaign import REPOSITORY
from benchmarks.peers.planner_process import PLANNERS
from benchmarks.report import markdown_table

PEER = "checkpoint_schedules"


def missing() -> list[str]:
    """Planners that cannot take part, and why."""
    return [] if find_spec(PEER) else [f"{PEER} is not installed: its planners are left out"]


def measure_all(
    lengths: Sequence[int], states: Sequence[int], limit_seconds: float
) -> list[dict[str, Any]]:
    """Every planner at every length and number of states, each in a fresh process.

    A planner that has run out of time is not asked for anything longer.
    """
    keys = [key for key in PLANNERS if find_spec(PEER) or not key.startswith("cs-")]
    results = []
    for num_states in states:
        out_of_time: set[str] = set()
        for num_steps in lengths:
            for key in (key for key in keys if key not in out_of_time):
                result = _measured(key, num_steps, num_states, limit_seconds)
                if "over_seconds" in result:
                    out_of_time.add(key)
                row = {"planner": key, "num_steps": num_steps, "num_states": num_states, **result}
                results.append(row)
                print("  ".join(str(value) for value in row.values()), flush=True)
    return results


def _measured(key: str, num_steps: int, num_states: int, limit_seconds: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.peers.planner_process", key]
    command += ["--steps", str(num_steps), "--states", str(num_states)]
    try:
        done = subprocess.run(
            command, cwd=REPOSITORY, capture_output=True, text=True, timeout=limit_seconds
        )
    except subprocess.TimeoutExpired:
        return {"over_seconds": limit_seconds}
    if done.returncode != 0:
        return {"error": (done.stderr.strip().splitlines() or ["killed"])[-1]}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def table(results: Sequence[dict[str, Any]]) -> str:
    """All results as Markdown."""
    header = ("steps", "slots", "planner", "executed", "per step", "first action", "all actions")
    return markdown_table(header, [_cells(result) for result in results])


def _cells(result: dict[str, Any]) -> tuple[str, ...]:
    label, _ = PLANNERS[result["planner"]]
    start = (f"{result['num_steps']:,}", str(result["num_states"]), label)
    if "error" in result:
        return (*start, result["error"], "", "", "")
    if "over_seconds" in result:
        return (*start, "", "", "", f"over {result['over_seconds']:g} s")
    return (
        *start,
        f"{result['executed_steps']:,}",
        f"{result['executed_steps'] / result['num_steps']:.3f}",
        f"{1000 * result['first_action_seconds']:.1f} ms",
        f"{1000 * result['all_actions_seconds']:.1f} ms",
    )
