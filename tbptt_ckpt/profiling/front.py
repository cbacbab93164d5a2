"""Which rows of a profile no other row beats."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tbptt_ckpt.arguments import checked
from tbptt_ckpt.profiling.report import MemoryReport


@checked
def pareto_front(rows: Sequence[MemoryReport]) -> tuple[MemoryReport, ...]:
    """Rows that no other row beats in both peak and time, the smallest peak first."""
    measured = [row for row in rows if row.peak_bytes is not None and row.seconds is not None]
    timed = zip(comparable_times(measured), measured, strict=True)
    fastest, front = math.inf, []
    for time, row in sorted(timed, key=lambda entry: (entry[1].peak_bytes or 0, entry[0])):
        if time < fastest:
            fastest = time
            front.append(row)
    return tuple(front)


def are_in_turns(rows: Sequence[MemoryReport]) -> bool:
    """Whether all rows are of the same windows and were timed in turns with plain BPTT."""
    alike = len({(row.k1, row.k2) for row in rows}) == 1
    # One after the other there is a ratio and no range of it; that of plain BPTT is 1.
    return alike and all(row.ratio == 1.0 or row.ratio_range is not None for row in rows)


def comparable_times(rows: Sequence[MemoryReport]) -> list[float]:
    """A time for each row: its ratio where all were timed in turns, else its seconds.

    A machine's speed drifts from row to row; the ratio was taken between neighbours.
    """
    in_turns = are_in_turns(rows)
    return [(row.ratio if in_turns else row.seconds) or 0.0 for row in rows]
