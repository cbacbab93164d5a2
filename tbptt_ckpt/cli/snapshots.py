"""`tbptt-ckpt snapshots`."""

from __future__ import annotations

import json as json_format
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from tbptt_ckpt.cli.tables import table
from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.memory.sizes import format_bytes
from tbptt_ckpt.snapshot.store import SnapshotReport, SnapshotStore


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
        _print_reports(directory, reports)
    if any(report.problem for report in reports):
        raise typer.Exit(1)


def _print_reports(directory: Path, reports: list[SnapshotReport]) -> None:
    """Print a table on the standard output."""
    made = table(f"snapshots in {directory}")
    made.add_column("steps", justify="right")
    made.add_column("taken")
    made.add_column("size", justify="right")
    made.add_column("state", overflow="fold")
    for report in reports:
        made.add_row(
            f"{report.step:,}",
            report.created or "",
            format_bytes(report.num_bytes),
            Text(report.problem or "valid"),
        )
    Console().print(made)
