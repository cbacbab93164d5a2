"""`tbptt-ckpt plan`."""

from __future__ import annotations

from typing import Annotated

import typer

from tbptt_ckpt.cli.plan.config import PlanningConfig
from tbptt_ckpt.cli.plan.job import run_planning_job
from tbptt_ckpt.cli.plan.report import plan_json, print_plan


def plan(
    config: PlanningConfig,
    *,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Plan one window: the fastest way to differentiate it within a byte budget.

    Costs are measured on a model, or given by hand or in a file. Shows the
    plan, a drawing of it, and what time each further megabyte buys.
    """
    outcome = run_planning_job(config)
    if json:
        typer.echo(plan_json(outcome))
    else:
        print_plan(outcome)
