"""A profile as a table of text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from textwrap import wrap
from typing import Any

from tbptt_ckpt.memory.sizes import format_bytes
from tbptt_ckpt.profiling.report import MemoryReport
from tbptt_ckpt.schedule.forms import described

_BATCHING = "time batching"
_GAP = "  "

# A title of one or two words, one above the other, and what stands below it.
Column = tuple[str, Callable[[MemoryReport], str]]


def table_of(
    rows: Sequence[MemoryReport], what: str, environment: Mapping[str, Any], width: int
) -> str:
    """The rows, a title above and what they mean below, in lines of at most so many characters."""
    device = next((row.device for row in rows if row.is_ok), "cpu")
    columns = [_filled(column, rows) for column in _columns(device) if _tells(column, rows)]
    while len(columns) > 1 and sum(map(_width_of, columns)) + len(_GAP) * len(columns) > width:
        columns.pop(1 + max(range(len(columns) - 1), key=lambda n: _RANK.get(columns[n + 1][0], 0)))
    lines = [f"{what or 'profile'}, {device}: one warm window and its update", ""]
    lines += _head(columns)
    for number in range(len(rows)):
        cells = (_placed(column, column[1][number]) for column in columns)
        lines.append(_GAP.join(cells).rstrip())
    notes = [*_notes(rows, environment), *map(_form, (row for row in rows if row.forms))]
    notes += map(_message, (row for row in rows if row.message))
    return "\n".join([*lines, "", *(line for note in notes for line in wrap(note, width))])


def _columns(device: str) -> list[Column]:
    peak = "tensor peak" if device == "cpu" else "allocated peak"
    return [
        ("strategy", lambda row: row.strategy),
        ("k1", lambda row: f"{row.k1:,}"),
        ("k2", lambda row: f"{row.k2:,}"),
        ("budget", lambda row: _size(row.budget_bytes)),
        (_BATCHING, lambda row: row.time_batching),
        (peak, lambda row: _size(row.peak_bytes) if row.is_ok else row.status),
        ("predicted by", lambda row: _number(row.prediction_error, "+.1%")),
        ("reserved peak", lambda row: _size(row.reserved_peak_bytes)),
        ("allocation retries", lambda row: _number(row.allocation_retries, ",")),
        ("process RSS", lambda row: _size(row.rss_peak_bytes)),
        ("seconds a window", lambda row: _number(row.seconds, ".3f")),
        ("over plain", lambda row: _number(row.ratio, ".2f")),
        ("its range", _range),
        ("runs a step", lambda row: _number(row.executed_steps_per_step, ".2f")),
        ("held states", lambda row: _number(row.held_states, ",")),
    ]


# Columns that go first where there is no place; others stay.
_RANK = {
    name: rank
    for rank, name in enumerate(
        [
            *("predicted by", "its range", "runs a step", "allocation retries", "held states"),
            "process RSS",
        ],
        1,
    )
}


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


def _filled(column: Column, rows: Sequence[MemoryReport]) -> tuple[str, list[str]]:
    title, cell = column
    return title, [cell(row) for row in rows]


def _width_of(column: tuple[str, list[str]]) -> int:
    title, cells = column
    return max(map(len, [*title.split(" ", 1), *cells]))


def _placed(column: tuple[str, list[str]], text: str) -> str:
    width = _width_of(column)
    return text.ljust(width) if column[0] == "strategy" else text.rjust(width)


def _head(columns: Sequence[tuple[str, list[str]]]) -> list[str]:
    words = [[*([""] * (" " not in title)), *title.split(" ", 1)] for title, _ in columns]
    pairs = list(zip(columns, words, strict=True))
    lines = [_GAP.join(_placed(column, word[n]) for column, word in pairs).rstrip() for n in (0, 1)]
    return [*lines, _GAP.join("-" * _width_of(column) for column in columns)]


def _notes(rows: Sequence[MemoryReport], environment: Mapping[str, Any]) -> list[str]:
    first = rows[0] if rows else None
    notes = []
    if first is not None:
        k1, k2 = (
            ",".join(f"{k:,}" for k in dict.fromkeys(getattr(row, name) for row in rows))
            for name in ("k1", "k2")
        )
        notes.append(f"k1={k1}, k2={k2}, {first.overlap} overlap, executor {first.executor}")
    fixed = [row.fixed_bytes for row in rows if row.fixed_bytes is not None]
    if fixed:
        notes.append(
            f"of each peak {format_bytes(max(fixed))} are there whatever the schedule: weights, "
            "gradients, optimizer state, inputs, states carried over"
        )
    kept = max((row.library_bytes or 0 for row in rows), default=0)
    if kept:
        notes[-1] += f", and {format_bytes(kept)} that libraries keep"
    stored = max((row for row in rows if row.store_seconds), key=_store_seconds, default=None)
    if stored is not None:
        notes.append(
            f"a kept state takes {format_bytes(stored.kept_state_bytes or 0)} of it, and "
            f"{1e3 * _store_seconds(stored):.3g} ms to be written elsewhere and read again"
        )
    if environment:
        notes.append("torch {torch}, {threads} threads, {processor}".format(**environment))
    return notes


def _store_seconds(row: MemoryReport) -> float:
    return row.store_seconds or 0.0


def _form(row: MemoryReport) -> str:
    return f"{_named(row)}: {described(str(row.form), row.forms.items())}"


def _message(row: MemoryReport) -> str:
    return f"{_named(row)}: {row.message}"


def _named(row: MemoryReport) -> str:
    budget = f", budget {_size(row.budget_bytes)}" if row.budget_bytes is not None else ""
    return f"{row.strategy}, k1={row.k1}, k2={row.k2}{budget}"


def _range(row: MemoryReport) -> str:
    return "" if row.ratio_range is None else "{:.2f}-{:.2f}".format(*row.ratio_range)


def _size(num_bytes: int | None) -> str:
    return "" if num_bytes is None else format_bytes(num_bytes)


def _number(number: float | None, form: str) -> str:
    return "" if number is None else format(number, form)
