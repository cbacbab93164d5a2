"""A plan as tables and a drawing, or as JSON."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tbptt_ckpt.cli.plan.drawing import MOST_ACTIONS, draw_plan, format_seconds
from tbptt_ckpt.cli.plan.job import PlanningOutcome
from tbptt_ckpt.cli.terminal import figure_table, table
from tbptt_ckpt.memory.sizes import format_bytes


def print_plan(outcome: PlanningOutcome) -> None:
    """Print the plan, its drawing and the table of budgets on the standard output."""
    console = Console(highlight=False)
    title = f"{outcome.config.steps:,} steps: {outcome.what}"
    console.print(figure_table(title, plan_rows(outcome), min_width=60))
    drawing = draw_plan(outcome.plan, outcome.costs)
    for line in drawing or [f"(no drawing: above {MOST_ACTIONS:,} actions)"]:
        console.print(Text(line), soft_wrap=True)
    if drawing:
        legend = "-: advanced   #: differentiated   o: state kept   | leaf begins   down: time"
        console.print(Text(legend, style="dim"))
    console.print()
    console.print(_budget_table(outcome))


def plan_rows(outcome: PlanningOutcome) -> list[tuple[str, str]]:
    """What the table says, line by line."""
    plan, retained, seconds = outcome.plan, outcome.retained, outcome.plan.predicted_seconds
    budget = outcome.config.budget
    limit = "none" if budget is None else format_bytes(budget)
    fixed = outcome.costs.fixed.total(outcome.config.steps)
    return [
        ("strategy", plan.strategy),
        ("budget", limit),
        ("predicted peak", format_bytes(plan.predicted_peak_bytes)),
        ("  of it there in any case", format_bytes(fixed)),
        ("  everything retained", format_bytes(retained.predicted_peak_bytes)),
        ("predicted time", format_seconds(seconds)),
        ("  over everything retained", f"{_ratio(seconds, retained.predicted_seconds):.3f}"),
        ("executed steps per step", f"{plan.executed_steps / plan.num_steps:.3f}"),
        ("levels", f"{plan.num_levels:,}"),
        ("leaves", f"{plan.num_leaves:,}, up to {plan.longest_leaf:,} steps"),
        ("states at once", f"{plan.num_boundaries:,} of {format_bytes(outcome.costs.state_bytes)}"),
        ("longest call of an advance", f"{plan.advance_steps:,} steps"),
    ]


def _budget_table(outcome: PlanningOutcome) -> Table:
    made = table("From the smallest budget to keeping everything", pad_edge=False)
    for name in ("budget", "time", "over retained", "executed/step", "saved per MiB"):
        made.add_column(name, justify="right")
    for row in ladder_rows(outcome):
        saved = row["saved_seconds_per_mib"]
        made.add_row(
            format_bytes(row["budget_bytes"]),
            format_seconds(row["predicted_seconds"]),
            f"{row['over_retained']:.3f}",
            f"{row['executed_steps_per_step']:.3f}",
            "" if saved is None else format_seconds(saved),
        )
    return made


def ladder_rows(outcome: PlanningOutcome) -> list[dict[str, Any]]:
    """The table of budgets, as data."""
    rows: list[dict[str, Any]] = []
    for before, rung in zip((None, *outcome.ladder), outcome.ladder, strict=False):
        seconds, saved = rung.plan.predicted_seconds, None
        if before is not None:
            bought = before.plan.predicted_seconds - seconds
            saved = bought * 2**20 / (rung.budget_bytes - before.budget_bytes)
        rows.append(
            {
                "budget_bytes": rung.budget_bytes,
                "predicted_peak_bytes": rung.plan.predicted_peak_bytes,
                "predicted_seconds": seconds,
                "over_retained": _ratio(seconds, outcome.retained.predicted_seconds),
                "executed_steps_per_step": rung.plan.executed_steps / rung.plan.num_steps,
                "saved_seconds_per_mib": saved,
            }
        )
    return rows


def plan_json(outcome: PlanningOutcome) -> str:
    """The outcome as one JSON object on one line."""
    plan = outcome.plan
    return json.dumps(
        {
            "what": outcome.what,
            "steps": outcome.config.steps,
            "budget_bytes": outcome.config.budget,
            "plan": {
                **plan.to_dict(),
                "executed_steps": plan.executed_steps,
                "longest_leaf": plan.longest_leaf,
                "num_boundaries": plan.num_boundaries,
                "num_levels": plan.num_levels,
                "num_leaves": plan.num_leaves,
            },
            "retained": outcome.retained.to_dict(),
            "budgets": ladder_rows(outcome),
            "costs": outcome.costs.to_dict(),
        },
        allow_nan=False,
    )


def _ratio(seconds: float, over: float) -> float:
    return seconds / over if over else 1.0
