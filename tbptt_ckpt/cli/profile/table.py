"""A profile as a table for people."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tbptt_ckpt.cli.profile.config import ProfileConfig
from tbptt_ckpt.memory.sizes import format_bytes
from tbptt_ckpt.profiling.report import MemoryReport, StrategyReport

_BATCHING = "time\nbatching"
_WIDTH = 120  # where there is no terminal to ask


@dataclass(frozen=True, slots=True)
class _Column:
    """A title, and what stands below it."""

    title: str
    cell: Callable[[MemoryReport], str]


def print_profile(report: StrategyReport, config: ProfileConfig) -> None:
    """Print the rows as a table on the standard output, and what went wrong below it."""
    rows = report.rows
    device = next((row.device for row in rows if row.is_ok), "cpu")
    table = Table(
        # Text, since a file name in brackets would be read as markup.
        title=Text(f"{config.model} on {device}: one warm window and its update"),
        caption=Text(_caption(report, config)),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    columns = [column for column in _columns(device) if _tells(column, rows)]
    for position, column in enumerate(columns):
        table.add_column(column.title, justify="left" if position == 0 else "right")
    for row in rows:
        table.add_row(*(column.cell(row) for column in columns))
    console = Console() if sys.stdout.isatty() else Console(width=_WIDTH)
    console.print(table)
    for row in rows:
        if row.message:
            console.print(Text(f"{_name(row)}: {row.message}"))


def _tells(column: _Column, rows: Sequence[MemoryReport]) -> bool:
    """Whether a column has anything in it, and some more than one value."""
    cells = {column.cell(row) for row in rows}
    if column.title in ("k1", "k2"):
        return len(cells) > 1
    if column.title == _BATCHING:  # rows that differ in nothing else need it
        others = {(row.strategy, row.k1, row.k2, row.budget_bytes) for row in rows}
        return len(others) < len(rows)
    return cells != {""}


def _columns(device: str) -> list[_Column]:
    peak = "CPU tensor\npeak" if device == "cpu" else "allocated\npeak"
    return [
        _Column("strategy", lambda row: row.strategy),
        _Column("k1", lambda row: str(row.k1)),
        _Column("k2", lambda row: str(row.k2)),
        _Column("budget", lambda row: _size(row.budget_bytes)),
        _Column(_BATCHING, lambda row: row.time_batching),
        _Column(peak, _peak),
        _Column("predicted", lambda row: _size(row.predicted_peak_bytes)),
        _Column("error", lambda row: _percent(row.prediction_error)),
        _Column("reserved\npeak", lambda row: _size(row.reserved_peak_bytes)),
        _Column("allocation\nretries", lambda row: _count(row.allocation_retries)),
        _Column("process\nRSS peak", lambda row: _size(row.rss_peak_bytes)),
        _Column("seconds\na window", lambda row: _decimal(row.seconds, 3)),
        _Column("over\nplain", lambda row: _decimal(row.ratio, 2)),
        _Column("executed\nper step", lambda row: _decimal(row.executed_steps_per_step, 2)),
        _Column("held\nstates", lambda row: _count(row.held_states)),
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


def _name(row: MemoryReport) -> str:
    budget = "" if row.budget_bytes is None else f", budget {format_bytes(row.budget_bytes)}"
    return f"{row.strategy}, k1={row.k1}, k2={row.k2}{budget}"


def _peak(row: MemoryReport) -> str:
    return _size(row.peak_bytes) if row.is_ok else row.status


def _size(num_bytes: int | None) -> str:
    return "" if num_bytes is None else format_bytes(num_bytes)


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def _decimal(number: float | None, places: int) -> str:
    return "" if number is None else f"{number:.{places}f}"


def _percent(part: float | None) -> str:
    return "" if part is None else f"{part:+.1%}"
