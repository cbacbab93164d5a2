"""`tbptt-ckpt profile`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from tbptt_ckpt.cli.profile.config import ProfileConfig
from tbptt_ckpt.cli.profile.job import run_profile
from tbptt_ckpt.cli.profile.table import print_profile
from tbptt_ckpt.cli.progress import progress_bar
from tbptt_ckpt.profiling.failure import ProfileError


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
