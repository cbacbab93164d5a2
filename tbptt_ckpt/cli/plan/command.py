"""`tbptt-ckpt plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tbptt_ckpt.cli.options import Device, Dtype, Hidden, Lanes, Layers
from tbptt_ckpt.cli.plan.job import PlanningConfig, run_planning_job
from tbptt_ckpt.cli.plan.report import plan_json, print_plan

_DEFAULT = PlanningConfig()


def plan(
    steps: Annotated[int, typer.Option(help="Steps a window reaches back (k2).")] = _DEFAULT.steps,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Peak of device memory, everything included, such as 512MiB.",
            show_default="no limit",
        ),
    ] = None,
    strategy: Annotated[
        str,
        typer.Option(help="optimal, retain, sqrt, step, uniform:LENGTH or revolve:STATES."),
    ] = _DEFAULT.strategy,
    model: Annotated[
        str | None,
        typer.Option(
            help="Measure this: lstm, gru, rnn, lstmcell, or your own package.module:factory.",
            show_default="lstm, unless costs are given",
        ),
    ] = None,
    hidden: Hidden = _DEFAULT.hidden,
    layers: Layers = _DEFAULT.layers,
    lanes: Lanes = _DEFAULT.lanes,
    device: Device = None,
    dtype: Dtype = _DEFAULT.dtype,
    costs: Annotated[
        Path | None, typer.Option(help="Take the costs of this JSON file, as --json prints them.")
    ] = None,
    state_bytes: Annotated[
        str | None, typer.Option(help="One boundary state, by hand; with --step-bytes.")
    ] = None,
    step_bytes: Annotated[
        str | None, typer.Option(help="Each step of a leaf, by hand; with --state-bytes.")
    ] = None,
    leaf_bytes: Annotated[str, typer.Option(help="A leaf in addition, by hand.")] = "0",
    fixed_bytes: Annotated[
        str, typer.Option(help="Weights, gradients and all else that is there, by hand.")
    ] = "0",
    step_seconds: Annotated[
        float, typer.Option(help="Running one step without a graph, by hand.")
    ] = _DEFAULT.step_seconds,
    call_seconds: Annotated[
        float, typer.Option(help="Each call in addition, by hand.")
    ] = _DEFAULT.call_seconds,
    backward_ratio: Annotated[
        float, typer.Option(help="Differentiating a step over running it, by hand.")
    ] = _DEFAULT.backward_ratio,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Plan one window: the fastest way to differentiate it within a byte budget.

    Costs are measured on a model, or given by hand or in a file. Shows the
    plan, a drawing of it, and what time each further megabyte buys.
    """
    config = PlanningConfig(
        steps=steps,
        budget=budget,
        strategy=strategy,
        model=model,
        hidden=hidden,
        layers=layers,
        lanes=lanes,
        device=device,
        dtype=dtype,
        costs=costs,
        state_bytes=state_bytes,
        step_bytes=step_bytes,
        leaf_bytes=leaf_bytes,
        fixed_bytes=fixed_bytes,
        step_seconds=step_seconds,
        call_seconds=call_seconds,
        backward_ratio=backward_ratio,
    )
    outcome = run_planning_job(config)
    if json:
        typer.echo(plan_json(outcome))
    else:
        print_plan(outcome)
