"""The subcommands: each parses its options, calls one public function, and reports."""

from __future__ import annotations

import json as json_format
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from tbptt_ckpt.cli.configs import PlanningConfig, ProfileConfig, TrainingConfig
from tbptt_ckpt.cli.plan.job import run_planning_job
from tbptt_ckpt.cli.plan.report import plan_json, print_plan
from tbptt_ckpt.cli.profile.job import run_profile
from tbptt_ckpt.cli.profile.table import print_profile
from tbptt_ckpt.cli.terminal import progress_bar, table
from tbptt_ckpt.cli.train.job import run_training_job
from tbptt_ckpt.cli.train.outcome import outcome_json, print_outcome
from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.memory.sizes import format_bytes
from tbptt_ckpt.profiling.configuration import ProfileError
from tbptt_ckpt.snapshot.store import SnapshotStore


def train(
    config: TrainingConfig,
    *,
    json: Annotated[
        bool, typer.Option("--json", help="Print the outcome as one JSON object.")
    ] = False,
) -> None:
    """Train a byte-level language model and report loss, speed and memory.

    Without options it learns the source text of Python's standard library,
    in about a minute on two cores, and compares itself with a bigram table
    on text that was held out.
    """
    with progress_bar("steps") as watch:
        outcome = run_training_job(config, watch)
    if json:
        typer.echo(outcome_json(outcome))
    else:
        print_outcome(outcome)


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


def profile(
    config: ProfileConfig,
    *,
    json: Annotated[
        bool, typer.Option("--json", help="Print the rows as one JSON object.")
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where your model's error was raised.")
    ] = False,
) -> None:
    """Measure what a window takes in memory and time under each strategy.

    Plain BPTT is always a row. Every row is measured in a fresh process.
    Options that take a list, separated by commas, measure every combination.
    """
    try:
        with progress_bar("rows") as watch:
            report = run_profile(config, watch)
    except ProfileError as error:
        if traceback and error.remote_traceback:
            print(error.remote_traceback, file=sys.stderr)
        raise
    if json:
        typer.echo(report.to_json(traces=False))
    else:
        print_profile(report, config)


def snapshots(
    directory: Annotated[Path, typer.Argument(help="Directory that --snapshot-dir named.")],
    json: Annotated[
        bool, typer.Option("--json", help="Print the list as one JSON object.")
    ] = False,
) -> None:
    """List the snapshots in a directory and verify every byte of them.

    Nothing in them is loaded. The exit code is 1 if one is broken.
    """
    if not directory.is_dir():
        raise ArgumentError(f"there is no directory {directory}")
    reports = list(SnapshotStore(directory).reports())
    if json:
        # `problem` is null for a valid snapshot.
        items = [{**asdict(report), "path": str(report.path)} for report in reports]
        typer.echo(json_format.dumps({"directory": str(directory), "snapshots": items}))
    else:
        made = table(f"snapshots in {directory}")
        made.add_column("steps", justify="right")
        made.add_column("taken")
        made.add_column("size", justify="right")
        made.add_column("state", overflow="fold")
        for report in reports:
            size, state = format_bytes(report.num_bytes), Text(report.problem or "valid")
            made.add_row(f"{report.step:,}", report.created or "", size, state)
        Console().print(made)
    if any(report.problem for report in reports):
        raise typer.Exit(1)
