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


class _Column:
    """A title of one or two words, one above the other, and what stands below it."""

    def __init__(
        self, title: str, cell: Callable[[MemoryReport], str], rows: Sequence[MemoryReport]
    ) -> None:
        self.title, self.cells = title, [cell(row) for row in rows]
        self.head = title.split(" ", 1) if " " in title else ["", title]
        self.width = max(map(len, [*self.head, *self.cells]))

    def placed(self, text: str) -> str:
        """A text in the column's width."""
        return text.ljust(self.width) if self.title == "strategy" else text.rjust(self.width)


def table_of(
    rows: Sequence[MemoryReport], what: str, environment: Mapping[str, Any], width: int
) -> str:
    """The rows, a title above and what they mean below, in lines of at most so many characters."""
    device = next((row.device for row in rows if row.is_ok), "cpu")
    filled = [_Column(title, cell, rows) for title, cell in _columns(device).items()]
    columns = [column for column in filled if _tells(column, rows)]
    while len(columns) > 1 and sum(len(_GAP) + column.width for column in columns) > width:
        columns.remove(max(columns[1:], key=lambda column: _RANK.get(column.title, 0)))
    lines = [f"{what or 'profile'}, {device}: one warm window and its update", ""]
    above, below, *cells = zip(*([*c.head, *c.cells] for c in columns), strict=True)
    rule = ["-" * column.width for column in columns]
    for line in (above, below, rule, *cells):
        placed = (column.placed(text) for column, text in zip(columns, line, strict=True))
        lines.append(_GAP.join(placed).rstrip())
    notes = _notes(rows, environment)
    notes += [f"{_named(r)}: {described(str(r.form), r.forms.items())}" for r in rows if r.forms]
    notes += [f"{_named(row)}: {row.message}" for row in rows if row.message]
    return "\n".join([*lines, "", *(line for note in notes for line in wrap(note, width))])


def _columns(device: str) -> dict[str, Callable[[MemoryReport], str]]:
    peak = "tensor peak" if device == "cpu" else "allocated peak"
    return {
        "strategy": lambda row: row.strategy,
        "k1": lambda row: f"{row.k1:,}",
        "k2": lambda row: f"{row.k2:,}",
        "budget": lambda row: _size(row.budget_bytes),
        _BATCHING: lambda row: row.time_batching,
        peak: lambda row: _size(row.peak_bytes) if row.is_ok else row.status,
        "on ranks": lambda row: _sizes(row.peak_bytes_of_ranks),
        "predicted by": lambda row: _number(row.prediction_error, "+.1%"),
        "reserved peak": lambda row: _size(row.reserved_peak_bytes),
        "allocation retries": lambda row: _number(row.allocation_retries, ","),
        "process RSS": lambda row: _size(row.rss_peak_bytes),
        "seconds a window": lambda row: _number(row.seconds, ".3f"),
        "over plain": lambda row: _number(row.ratio, ".2f"),
        "its range": lambda row: "-".join(f"{end:.2f}" for end in row.ratio_range or ()),
        "runs a step": lambda row: _number(row.executed_steps_per_step, ".2f"),
        "gradient off": lambda row: _number(row.gradient_error, ".1e"),
        "held states": lambda row: _number(row.held_states, ","),
    }


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


def _tells(column: _Column, rows: Sequence[MemoryReport]) -> bool:
    """Whether a column has anything in it, and some more than one value."""
    if column.title in ("k1", "k2"):
        return len(set(column.cells)) > 1
    if column.title == _BATCHING:  # rows that differ in nothing else need it
        others = {(row.strategy, row.k1, row.k2, row.budget_bytes) for row in rows}
        return len(others) < len(rows)
    return set(column.cells) != {""}


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


def _named(row: MemoryReport) -> str:
    budget = f", budget {_size(row.budget_bytes)}" if row.budget_bytes is not None else ""
    return f"{row.strategy}, k1={row.k1}, k2={row.k2}{budget}"


def _size(num_bytes: int | None) -> str:
    return "" if num_bytes is None else format_bytes(num_bytes)


def _sizes(sizes: Sequence[int | None] | None) -> str:
    return ", ".join(_size(size) or "-" for size in sizes or ())


def _number(number: float | None, form: str) -> str:
    return "" if number is None else format(number, form)
