"""The drawing of a plan: what happens to which steps, from top to bottom in time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from tbptt_ckpt import Costs
from tbptt_ckpt.cli.terminal import format_seconds
from tbptt_ckpt.planner.predictions import advance_seconds
from tbptt_ckpt.schedule import Advance, Differentiate, Drop, Keep
from tbptt_ckpt.schedule.plan import PredictedPlan

COLUMNS = 66  # beside the labels on a terminal of 80
LABEL = 13
ROWS = 18
MOST_ACTIONS = 2_000_000  # a few seconds to walk

IDLE, ADVANCED, DIFFERENTIATED, KEPT = " ", "-", "#", "o"


def draw_plan(plan: PredictedPlan, costs: Costs) -> list[str]:
    """The lines of the drawing; none for a plan of too many actions to walk through."""
    if len(plan.schedule) > MOST_ACTIONS:
        return []
    canvas = _Canvas(plan, costs)
    stop = f"{plan.first + plan.lead_steps + plan.num_steps:,}"
    return [
        _line("steps", f"{plan.first:<{COLUMNS - len(stop)}}{stop}"),
        *canvas.levels(),
        _line("leaves", canvas.leaves()),
        *canvas.timeline(),
    ]


def _line(label: str, text: str) -> str:
    return f"{label:>{LABEL - 2}}  {text}".rstrip()


class _Canvas:
    """Walks through a plan once and notes what each column and row sees."""

    def __init__(self, plan: PredictedPlan, costs: Costs) -> None:
        self._plan, self._costs = plan, costs
        self._steps = plan.lead_steps + plan.num_steps
        self._seconds = plan.predicted_seconds or 1.0
        self._advanced_steps = [0.0] * COLUMNS
        self._leaf_starts: set[int] = set()
        # Columns by what happens there.
        marks = (DIFFERENTIATED, ADVANCED)
        self._rows: list[dict[str, set[int]]] = [{m: set() for m in marks} for _ in range(ROWS)]
        self._kept_by_row = [frozenset[int]()] * ROWS
        self._kept = Counter[int]()  # states by column
        self._columns_kept: frozenset[int] = frozenset()
        self._clock = 0.0
        for action in plan.schedule:
            if isinstance(action, Keep | Drop):
                self._keep(self._column(action.step), 1 if isinstance(action, Keep) else -1)
            else:
                self._run(action)

    def levels(self) -> list[str]:
        """Bars: how often the steps of each column are advanced."""
        columns = [steps * COLUMNS / self._steps for steps in self._advanced_steps]
        most = round(max(columns))
        shown = range(most, 0, -1) if most <= 6 else [most, *sorted({most // 2, 1}, reverse=True)]
        return [
            _line(
                f"advanced {level}x",
                "".join("=" if times >= level - 0.5 else IDLE for times in columns),
            )
            for level in shown
        ]

    def leaves(self) -> str:
        """A mark in every column where a leaf begins."""
        starts = {self._column(step) for step in self._leaf_starts}
        return "".join("|" if column in starts else "_" for column in range(COLUMNS))

    def timeline(self) -> list[str]:
        """The rows, from the first in time to the last."""
        return [
            _line(
                format_seconds(self._seconds * number / ROWS),
                "".join(self._mark(number, column) for column in range(COLUMNS)),
            )
            for number in range(ROWS)
        ]

    def _mark(self, number: int, column: int) -> str:
        """What is drawn where several things happen."""
        seen, kept = self._rows[number], self._kept_by_row[number]
        if column in seen[DIFFERENTIATED]:
            return DIFFERENTIATED
        if column in kept:
            return KEPT
        return ADVANCED if column in seen[ADVANCED] else IDLE

    def _keep(self, column: int, more: int) -> None:
        before, self._kept[column] = self._kept[column], self._kept[column] + more
        if not before or not self._kept[column]:
            self._columns_kept ^= {column}

    def _run(self, action: Advance | Differentiate) -> None:
        start, stop = action.start - self._plan.first, action.stop - self._plan.first
        if isinstance(action, Advance):
            seconds = advance_seconds(self._costs, stop - start, self._plan.advance_steps)
            self._count_advance(start, stop)
        else:
            seconds = self._costs.leaf_seconds(stop - start)
            self._leaf_starts.add(action.start)
        begun, self._clock = self._clock, self._clock + seconds
        for row, part in self._row_parts(begun, self._clock):
            seen = self._rows[row]
            if isinstance(action, Advance):
                low, high = start + part[0] * (stop - start), start + part[1] * (stop - start)
                seen[ADVANCED].update(self._span(low, high))
            else:  # a leaf is there as a whole until it is differentiated
                seen[DIFFERENTIATED].update(self._span(start, stop))
            self._kept_by_row[row] = self._columns_kept

    def _row_parts(self, begun: float, ended: float) -> Iterator[tuple[int, tuple[float, float]]]:
        """Rows that a stretch of time touches, and which part of it lies in each."""
        height = self._seconds / ROWS
        length = (ended - begun) or 1.0
        first, last = (min(ROWS - 1, int(t / height)) for t in (begun, ended))
        for row in range(first, last + 1):
            low = max(0.0, (row * height - begun) / length)
            high = min(1.0, ((row + 1) * height - begun) / length)
            if high > low or first == last:
                yield row, (low, high if row < ROWS - 1 else 1.0)

    def _count_advance(self, start: int, stop: int) -> None:
        width = self._steps / COLUMNS
        for column in self._span(start, stop):
            low, high = max(start, column * width), min(stop, (column + 1) * width)
            self._advanced_steps[column] += max(0.0, high - low)

    def _span(self, low: float, high: float) -> range:
        first = int(low * COLUMNS / self._steps)
        last = -int(-high * COLUMNS // self._steps)
        return range(min(first, COLUMNS - 1), max(first + 1, min(last, COLUMNS)))

    def _column(self, step: int) -> int:
        return min(COLUMNS - 1, (step - self._plan.first) * COLUMNS // self._steps)
