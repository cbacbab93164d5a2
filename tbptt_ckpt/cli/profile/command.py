"""`tbptt-ckpt profile`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from tbptt_ckpt.cli.options import Device, Dtype, ExecutorName, Hidden, Lanes, Layers, Overlap
from tbptt_ckpt.cli.profile.config import ProfileConfig
from tbptt_ckpt.cli.profile.job import run_profile
from tbptt_ckpt.cli.profile.table import print_profile
from tbptt_ckpt.cli.progress import row_progress
from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.memory.sizes import parse_bytes
from tbptt_ckpt.profiling.failure import ProfileError

_DEFAULT = ProfileConfig()
_T = TypeVar("_T")


def profile(
    data: Annotated[
        Path | None,
        typer.Option(help="File to read.", show_default="the Python standard library"),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            help="lstm, gru, rnn, lstmcell, or your own: package.module:factory or "
            "path/to/file.py:factory."
        ),
    ] = _DEFAULT.model,
    hidden: Hidden = _DEFAULT.hidden,
    layers: Layers = _DEFAULT.layers,
    lanes: Lanes = _DEFAULT.lanes,
    k1: Annotated[str, typer.Option(help="Steps between updates; 16,64 measures both.")] = "64",
    k2: Annotated[str, typer.Option(help="Steps an update reaches back; a list too.")] = "512",
    strategy: Annotated[
        str,
        typer.Option(help="auto, retain, sqrt, step, uniform:LENGTH, revolve:STATES; a list too."),
    ] = ",".join(_DEFAULT.strategies),
    budget: Annotated[
        str | None, typer.Option(help="Memory budgets such as 64MiB,128MiB.", show_default="none")
    ] = None,
    overlap: Overlap = _DEFAULT.overlap,
    executor: ExecutorName = _DEFAULT.executor,
    time_batching: Annotated[
        str, typer.Option(help="auto, true or false; plain BPTT is measured without.")
    ] = _DEFAULT.time_batching,
    device: Device = None,
    dtype: Dtype = _DEFAULT.dtype,
    repeats: Annotated[int, typer.Option(help="Windows to time for a row.")] = _DEFAULT.repeats,
    json: Annotated[
        bool, typer.Option("--json", help="Print the rows as one JSON object.")
    ] = False,
    csv: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw peak against time into this .png or .svg, and memory within each window "
            "into a second file, NAME-windows beside it."
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="Write the windows in time for chrome://tracing or ui.perfetto.dev."),
    ] = None,
    memory_history: Annotated[
        Path | None,
        typer.Option(
            help="On CUDA, write PyTorch's memory history of every row for pytorch.org/memory_viz. "
            "The name gets strategy, k1 and k2."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Let files be replaced.")] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where your model's error was raised.")
    ] = False,
) -> None:
    """Measure what a window takes in memory and time under each strategy.

    Plain BPTT is always a row. Every row is measured in a fresh process.
    Options that take a list, separated by commas, measure every combination.
    """
    config = ProfileConfig(
        data=data,
        model=model,
        hidden=hidden,
        layers=layers,
        lanes=lanes,
        k1=parse_list("--k1", k1, int),
        k2=parse_list("--k2", k2, int),
        strategies=parse_list("--strategy", strategy, str),
        budgets=() if budget is None else parse_list("--budget", budget, parse_budget),
        overlap=overlap,
        executor=executor,
        time_batching=time_batching,
        device=device,
        dtype=dtype,
        repeats=repeats,
        csv=csv,
        plot=plot,
        trace=trace,
        memory_history=memory_history,
        force=force,
    )
    try:
        with row_progress() as watch:
            report = run_profile(config, watch)
    except ProfileError as error:
        if traceback and error.remote_traceback:
            print(error.remote_traceback, file=sys.stderr)
        raise
    if json:
        typer.echo(report.to_json(traces=False))
    else:
        print_profile(report, config)


def parse_budget(text: str) -> int:
    """Bytes of one `--budget`."""
    return parse_bytes(text, "--budget")


def parse_list(option: str, text: str, parse: Callable[[str], _T]) -> tuple[_T, ...]:
    """The items of a list separated by commas.

    Raises:
        ArgumentError: An item that cannot be read.
    """
    items = [item.strip() for item in text.split(",") if item.strip()]
    if not items:
        raise ArgumentError(f"{option} names nothing; write one or several, such as 16,64")
    try:
        return tuple(parse(item) for item in items)
    except ArgumentError:
        raise
    except ValueError as error:
        raise ArgumentError(f"{option} {text} is no list of whole numbers such as 16,64") from error
