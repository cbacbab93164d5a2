"""What the measurements say: a row for each entry and work, and who beats whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.paired import PairedTimes
from benchmarks.peers.campaign import Records
from benchmarks.peers.entries import BASELINE, OURS, Entry
from benchmarks.peers.work import Size
from benchmarks.report import markdown_table

MIB = 2**20


@dataclass(frozen=True)
class Row:
    """One entry at one size.

    Attributes:
        entry: Who.
        size: The work.
        seconds: Of all runs, in the order of their rounds.
        peak_bytes: Temporaries above weights, gradients and inputs.
        rss_rise_bytes: How much the process grew in its first run, median over processes.
        gradient_error: Relative distance from the baseline's gradient.
    """

    entry: Entry
    size: Size
    seconds: NDArray[np.float64]
    peak_bytes: int
    rss_rise_bytes: float
    gradient_error: float

    @property
    def median_seconds(self) -> float:
        return float(np.median(self.seconds))

    @property
    def peak_mib(self) -> float:
        return self.peak_bytes / MIB


def over(baseline: Row, treated: Row) -> PairedTimes:
    """The runs of both, paired by round: they were neighbours in time."""
    count = min(len(baseline.seconds), len(treated.seconds))
    return PairedTimes(baseline.seconds[:count], treated.seconds[:count])


def rows_of(
    records: Records, entries: Sequence[Entry], sizes: Sequence[Size]
) -> tuple[list[Row], list[str]]:
    """A row where everything was measured; a line where something failed."""
    rows, failures = [], []
    for size in sizes:
        for entry in entries:
            done = {
                j: r for j, r in records.results.items() if (j.entry, j.size) == (entry.key, size)
            }
            errors = [result["error"] for result in done.values() if "error" in result]
            if errors:
                failures.append(f"{entry.label}, {size}: {errors[0]}")
            elif {job.what for job in done} == {"peak", "time"}:
                rows.append(_row(entry, size, list(done.values())))
    return rows, failures


def _row(entry: Entry, size: Size, results: Sequence[dict[str, Any]]) -> Row:
    timed = [result for result in results if "seconds" in result]
    return Row(
        entry,
        size,
        np.array([seconds for result in timed for seconds in result["seconds"]]),
        next(result["peak_bytes"] for result in results if "peak_bytes" in result),
        float(np.median([result["rss_rise_bytes"] for result in timed])),
        max(result["gradient_error"] for result in timed),
    )


@dataclass(frozen=True)
class Verdict:
    """A peer, and our fastest entry within its memory.

    Attributes:
        peer: The peer's row.
        ours: None where no entry of ours needs as little memory.
    """

    peer: Row
    ours: Row | None

    @property
    def times(self) -> PairedTimes | None:
        return None if self.ours is None else over(self.peer, self.ours)

    @property
    def kept(self) -> bool:
        """Whether we are at least as fast within the peer's memory."""
        return self.times is not None and self.times.ratio <= 1

    def cells(self) -> tuple[str, ...]:
        level = f"{self.peer.peak_mib:.1f} MiB, {self.peer.median_seconds:.2f} s"
        if self.ours is None or self.times is None:
            return (self.peer.entry.label, level, "none needs so little", "", "", "no")
        mine = f"{self.ours.peak_mib:.1f} MiB, {self.ours.median_seconds:.2f} s"
        ratio, interval = _ratio_cells(self.times)
        kept = "yes" if self.kept else "no"
        return (
            self.peer.entry.label,
            level,
            f"{self.ours.entry.label}: {mine}",
            ratio,
            interval,
            kept,
        )


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """For every peer of one size: do we need less time within its memory?"""
    ours = [row for row in rows if row.entry.family == OURS]
    found = []
    for peer in (row for row in rows if row.entry.family != OURS):
        within = [row for row in ours if row.peak_bytes <= peer.peak_bytes]
        best = min(within, key=lambda row: row.median_seconds, default=None)
        found.append(Verdict(peer, best))
    return found


def page(rows: Sequence[Row], failures: Sequence[str], sizes: Sequence[Size]) -> str:
    """All tables as Markdown."""
    sections = []
    for size in sizes:
        here = [row for row in rows if row.size == size]
        if here:
            sections.append(f"## {str(size).capitalize()}\n\n{size_tables(here)}\n")
    if failures:
        sections.append("Failed:\n\n" + "\n".join(f"- {line}" for line in failures) + "\n")
    return "\n".join(sections)


def size_tables(rows: Sequence[Row]) -> str:
    """All rows of one size, by memory; and the verdicts."""
    baseline = next((row for row in rows if row.entry == BASELINE), None)
    cells = [_cells(row, baseline) for row in sorted(rows, key=lambda row: -row.peak_bytes)]
    header = ("who", "time", "over plain", "95 % interval", "peak", "RSS", "gradient error")
    verdict_header = (
        "peer",
        "it takes",
        "ours within its memory",
        "time",
        "95 %",
        "at most its time?",
    )
    verdict_cells = [verdict.cells() for verdict in verdicts(rows)]
    return markdown_table(header, cells) + "\n\n" + markdown_table(verdict_header, verdict_cells)


def _cells(row: Row, baseline: Row | None) -> tuple[str, ...]:
    ratio = interval = ""
    if baseline is not None:
        ratio, interval = _ratio_cells(over(baseline, row))
    return (
        row.entry.label,
        f"{row.median_seconds:.2f} s",
        ratio,
        interval,
        f"{row.peak_mib:.1f} MiB",
        f"{row.rss_rise_bytes / MIB:.0f} MiB",
        f"{row.gradient_error:.0e}",
    )


def _ratio_cells(times: PairedTimes) -> tuple[str, str]:
    """The median ratio and its interval, which a single pair does not have."""
    if len(times.baseline) == 1:
        return f"{times.ratio:.2f} x", "one run"
    low, high = times.interval
    return f"{times.ratio:.2f} x", f"{low:.2f} to {high:.2f}"
