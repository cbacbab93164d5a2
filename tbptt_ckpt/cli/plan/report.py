"""Plans as tables and a drawing, or as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tbptt_ckpt import Costs
from tbptt_ckpt.cli.plan.drawing import MOST_ACTIONS, draw_plan
from tbptt_ckpt.cli.plan.job import PlanningOutcome, ReachesWithin, ReachOutcome
from tbptt_ckpt.cli.terminal import figure_table, format_seconds, table
from tbptt_ckpt.memory.sizes import format_bytes
from tbptt_ckpt.planner.ladder import FARTHEST, MOST_PLANNED, Reach
from tbptt_ckpt.profiling.figures import write_figure
from tbptt_ckpt.profiling.plots import draw_reaches
from tbptt_ckpt.schedule.forms import described

_LONGEST = {
    None: "",
    0: "longest, plain",
    1: "longest, 1 extra",
    2: "longest, 2 extra",
}


def print_plan(outcome: PlanningOutcome) -> None:
    """Print the plan, its drawing and the table of budgets on the standard output."""
    console = Console(highlight=False)
    title = f"{outcome.steps:,} steps: {outcome.what}"
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
    budget = outcome.budget_bytes
    limit = "none" if budget is None else format_bytes(budget)
    fixed = outcome.costs.fixed.total(outcome.steps)
    weighed = [("form", described(plan.form, plan.forms))] if plan.forms else []
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
        *_stored(outcome.costs),
        ("longest call of an advance", f"{plan.advance_steps:,} steps"),
        *weighed,
    ]


def _stored(costs: Costs) -> list[tuple[str, str]]:
    """What is left in memory of a state that is stored otherwise, and what that takes."""
    if costs.kept_bytes is None:
        return []
    left = f"{format_bytes(costs.kept_bytes)} of memory"
    return [("  each of them", f"{left}, {format_seconds(costs.store_seconds)} there and back")]


def _budget_table(outcome: PlanningOutcome) -> Table:
    made = table("What more memory buys: from each step run nine times to once", pad_edge=False)
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
            "steps": outcome.steps,
            "budget_bytes": outcome.budget_bytes,
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


def print_reaches(outcome: ReachOutcome) -> None:
    """Print a table for every budget on the standard output."""
    console = Console(highlight=False)
    for within in outcome.tables:
        console.print(_reach_table(outcome.what, within))


def _reach_table(what: str, within: ReachesWithin) -> Table:
    size = format_bytes(within.budget_bytes)
    given = size if within.budget == size.replace(" ", "") else f"{within.budget} ({size})"
    note = "k2: steps an update reaches back; plain: with everything kept, as plain\n"
    note += "BPTT has it; longest, 1 extra: no step runs forward more than once more"
    for levels, steps in within.longest.items():
        if steps > MOST_PLANNED:
            more = " or more" if steps == FARTHEST else ""
            note += f"\n{_LONGEST[levels]}: {steps:,} steps{more}, too many to be planned here"
    made = table(
        f"How far back within {given}: {what}",
        note,
        pad_edge=False,
    )
    for name in ("k2", "plain\npeak", "peak", "time of\nan update", "over\nplain"):
        made.add_column(name, justify="right")
    made.add_column("")
    for reach in within.reaches:
        row = reach_row(reach)
        made.add_row(
            f"{row['k2']:,}",
            format_bytes(row["retained_peak_bytes"]),
            format_bytes(row["predicted_peak_bytes"]),
            format_seconds(row["predicted_seconds"]),
            f"{row['over_retained']:.2f}",
            _LONGEST[reach.levels],
        )
    return made


def reach_row(reach: Reach) -> dict[str, Any]:
    """A row of the table of reaches, as data."""
    plan, retained = reach.plan, reach.retained
    return {
        "k2": plan.num_steps,
        "predicted_peak_bytes": plan.predicted_peak_bytes,
        "predicted_seconds": plan.predicted_seconds,
        "over_retained": _ratio(plan.predicted_seconds, retained.predicted_seconds),
        "executed_steps_per_step": plan.executed_steps / plan.num_steps,
        "retained_peak_bytes": retained.predicted_peak_bytes,
        "retained_seconds": retained.predicted_seconds,
        "longest_at_extra_forwards": reach.levels,
    }


def draw_table(outcome: ReachOutcome, path: Path) -> None:
    """Draw the tables into a file."""
    tables = [
        (f"within {format_bytes(within.budget_bytes)}", [*map(reach_row, within.reaches)])
        for within in outcome.tables
    ]
    write_figure(draw_reaches(outcome.what, tables), path)


def reaches_json(outcome: ReachOutcome) -> str:
    """The tables as one JSON object on one line."""
    reaches = [
        {
            "budget": within.budget,
            "budget_bytes": within.budget_bytes,
            "longest_by_extra_forwards": within.longest,
            "rows": [reach_row(reach) for reach in within.reaches],
        }
        for within in outcome.tables
    ]
    plain = {"what": outcome.what, "reaches": reaches, "costs": outcome.costs.to_dict()}
    return json.dumps(plain, allow_nan=False)


def _ratio(seconds: float, over: float) -> float:
    return seconds / over if over else 1.0
