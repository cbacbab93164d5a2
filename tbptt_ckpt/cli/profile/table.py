"""A profile as a table for people."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.text import Text

from tbptt_ckpt.cli.profile.config import ProfileConfig
from tbptt_ckpt.cli.terminal import table
from tbptt_ckpt.memory.sizes import format_bytes
from tbptt_ckpt.profiling.report import MemoryReport, StrategyReport

_BATCHING = "time\nbatching"
_WIDTH = 120  # where there is no terminal to ask


# A title, and what stands below it.
Column = tuple[str, Callable[[MemoryReport], str]]


def print_profile(report: StrategyReport, config: ProfileConfig) -> None:
    """Print the rows as a table on the standard output, and what went wrong below it."""
    rows = report.rows
    device = next((row.device for row in rows if row.is_ok), "cpu")
    title = f"{config.model} on {device}: one warm window and its update"
    made = table(title, _caption(report, config))
    columns = [column for column in _columns(device) if _tells(column, rows)]
    for position, (heading, _) in enumerate(columns):
        made.add_column(heading, justify="left" if position == 0 else "right")
    for row in rows:
        made.add_row(*(cell(row) for _, cell in columns))
    console = Console() if sys.stdout.isatty() else Console(width=_WIDTH)
    console.print(made)
    for row in rows:
        if row.message:
            budget = f", budget {_size(row.budget_bytes)}" if row.budget_bytes is not None else ""
            name = f"{row.strategy}, k1={row.k1}, k2={row.k2}{budget}"
            console.print(Text(f"{name}: {row.message}"))


def _tells(column: Column, rows: Sequence[MemoryReport]) -> bool:
    """Whether a column has anything in it, and some more than one value."""
    title, cell = column
    cells = {cell(row) for row in rows}
    if title in ("k1", "k2"):
        return len(cells) > 1
    if title == _BATCHING:  # rows that differ in nothing else need it
        others = {(row.strategy, row.k1, row.k2, row.budget_bytes) for row in rows}
        return len(others) < len(rows)
    return cells != {""}


def _columns(device: str) -> list[Column]:
    peak = "CPU tensor\npeak" if device == "cpu" else "allocated\npeak"
    return [
        ("strategy", lambda row: row.strategy),
        ("k1", lambda row: str(row.k1)),
        ("k2", lambda row: str(row.k2)),
        ("budget", lambda row: _size(row.budget_bytes)),
        (_BATCHING, lambda row: row.time_batching),
        (peak, lambda row: _size(row.peak_bytes) if row.is_ok else row.status),
        ("predicted", lambda row: _size(row.predicted_peak_bytes)),
        ("error", lambda row: _number(row.prediction_error, "+.1%")),
        ("reserved\npeak", lambda row: _size(row.reserved_peak_bytes)),
        ("allocation\nretries", lambda row: _number(row.allocation_retries, ",")),
        ("process\nRSS peak", lambda row: _size(row.rss_peak_bytes)),
        ("seconds\na window", lambda row: _number(row.seconds, ".3f")),
        ("over\nplain", lambda row: _number(row.ratio, ".2f")),
        ("executed\nper step", lambda row: _number(row.executed_steps_per_step, ".2f")),
        ("held\nstates", lambda row: _number(row.held_states, ",")),
    ]


def _caption(report: StrategyReport, config: ProfileConfig) -> str:
    fixed = [row.fixed_bytes for row in report.rows if row.fixed_bytes is not None]
    k1, k2 = (",".join(map(str, steps)) for steps in (config.k1, config.k2))
    lines = [
        f"k1={k1}, k2={k2}, {config.lanes} lanes, {config.overlap} overlap, "
        f"executor {config.executor}"
    ]
    if fixed:
        lines.append(
            f"of each peak {format_bytes(max(fixed))} are fixed: weights, gradients, optimizer "
            "state, inputs, states carried over"
        )
    if report.environment:
        lines.append("torch {torch}, {threads} threads, {processor}".format(**report.environment))
    return "\n".join(lines)


def _size(num_bytes: int | None) -> str:
    return "" if num_bytes is None else format_bytes(num_bytes)


def _number(number: float | None, form: str) -> str:
    return "" if number is None else format(number, form)
