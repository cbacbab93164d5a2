"""The subcommands: each parses its options, calls one public function, and reports.

What needs torch is imported where it is used, so that a `--help` is quick.
"""

from __future__ import annotations

import json as json_format
import shlex
import shutil
import sys
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from tbptt_ckpt.cli.explain.config import ExplainConfig
from tbptt_ckpt.cli.options import path_of
from tbptt_ckpt.cli.plan.config import PlanningConfig
from tbptt_ckpt.cli.profile.config import ProfileConfig
from tbptt_ckpt.cli.train.config import TrainingConfig
from tbptt_ckpt.errors import ArgumentError

GIVEN: ContextVar[Sequence[str]] = ContextVar("given", default=())  # what was typed
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def train(config: TrainingConfig, *, json: Json = False) -> None:
    """Train a model and report loss, speed and memory.

    Without options it learns the source text of Python's standard library,
    in about a minute on two cores, and compares itself with a bigram table
    on text that was held out. Processes that torchrun has started share the
    lanes and train together.
    """
    from tbptt_ckpt.cli.ranks import as_rank, is_first
    from tbptt_ckpt.cli.terminal import progress_bar
    from tbptt_ckpt.cli.train.job import run_training_job
    from tbptt_ckpt.cli.train.outcome import outcome_json, print_outcome

    with as_rank(config) as mine:
        if not is_first():
            run_training_job(mine)
            return
        with progress_bar("steps") as watch:
            outcome = run_training_job(mine, watch)
        typer.echo(outcome_json(outcome)) if json else print_outcome(outcome)


def plan(config: PlanningConfig, *, json: Json = False) -> None:
    """How far back fits into memory, and what it costs.

    Without --steps: a table of reaches (k2) within one or several budgets, their
    peaks and seconds, the longest at none, one and two extra forwards marked.
    With --steps: the fastest plan of one window, a drawing of it, and what time
    each further megabyte buys. Costs are measured on a model, or given by hand
    or in a file.
    """
    from tbptt_ckpt.cli.plan.job import PlanningOutcome, run_planning_job
    from tbptt_ckpt.cli.plan.report import (
        draw_table,
        plan_json,
        print_plan,
        print_reaches,
        reaches_json,
    )
    from tbptt_ckpt.cli.terminal import progress_bar

    with progress_bar("plans") as watch:
        outcome = run_planning_job(config, watch)
    if isinstance(outcome, PlanningOutcome):
        typer.echo(plan_json(outcome)) if json else print_plan(outcome)
        return
    if config.plot is not None:
        draw_table(outcome, config.plot)
    typer.echo(reaches_json(outcome)) if json else print_reaches(outcome)


def explain(config: ExplainConfig, *, json: Json = False) -> None:
    """How far back the gradient reaches, and what a window that long costs.

    Measures, at the weights that the model begins with, how much of the gradient
    is missing for every k2, and plans windows of those worth trying.
    """
    from tbptt_ckpt.cli.explain.job import run_explaining_job
    from tbptt_ckpt.cli.explain.report import (
        draw_explanation,
        explanation_json,
        print_explanation,
    )
    from tbptt_ckpt.cli.terminal import progress_bar

    with progress_bar("windows") as watch:
        found = run_explaining_job(config, watch)
    if config.plot is not None:
        draw_explanation(found, config.plot)
    typer.echo(explanation_json(found)) if json else print_explanation(found)


def profile(
    config: ProfileConfig,
    *,
    json: Json = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where your model's error was raised.")
    ] = False,
) -> None:
    """Measure what a window takes in memory and time under each strategy.

    Plain BPTT is always a row. Every row is measured in a fresh process.
    Options that take a list, separated by commas, measure every combination.
    Processes that torchrun has started share the lanes, and measure side by side.
    """
    from tbptt_ckpt.cli.profile.job import run_profile
    from tbptt_ckpt.cli.ranks import as_rank, is_first
    from tbptt_ckpt.cli.terminal import progress_bar
    from tbptt_ckpt.profiling.configuration import ProfileError

    command = shlex.join(["tbptt-ckpt", *GIVEN.get()])
    try:
        with as_rank(config) as mine:
            if not is_first():
                run_profile(mine)
                return
            with progress_bar("rows") as watch:
                report = run_profile(mine, watch, command=command)
    except ProfileError as error:
        if traceback and error.remote_traceback:
            print(error.remote_traceback, file=sys.stderr)
        raise
    # As wide as the terminal, as COLUMNS says, or as a page of text.
    width = shutil.get_terminal_size((100, 24)).columns
    typer.echo(report.to_json(traces=False) if json else report.table(width))


def snapshots(
    directory: Annotated[
        Path,
        typer.Argument(
            help="Directory that --snapshot-dir named.", parser=path_of, metavar="DIRECTORY"
        ),
    ],
    json: Json = False,
) -> None:
    """List the snapshots in a directory and verify every byte of them.

    Nothing in them is loaded. The exit code is 1 if one is broken.
    """
    from rich.console import Console
    from rich.text import Text

    from tbptt_ckpt.cli.terminal import table
    from tbptt_ckpt.memory.sizes import format_bytes
    from tbptt_ckpt.snapshot.store import SnapshotStore

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


def init(
    file: Annotated[
        Path,
        typer.Argument(help="File to write, such as mine.py.", parser=path_of, metavar="FILE"),
    ],
    force: Annotated[bool, typer.Option("--force", help="Replace a file.")] = False,
) -> None:
    """Write a workload to start from: your own cell, its loss and its data.

    It runs as it is: tbptt-ckpt train --model FILE:make
    """
    from tbptt_ckpt.cli.files import write_text
    from tbptt_ckpt.cli.starting import STARTING_POINT

    write_text("init", file, STARTING_POINT, force=force)
    for command in ("plan", "profile", "train"):
        typer.echo(f"tbptt-ckpt {command} --model {file}:make")


def doctor(json: Json = False) -> None:
    """Say what a bug report needs: versions, processor, devices, memory, extras."""
    from tbptt_ckpt.cli.doctor import examined, print_examined

    found = examined()
    typer.echo(json_format.dumps(found)) if json else print_examined(found)
