"""What profiling found of several configurations: a `StrategyReport`."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tbptt_ckpt.arguments import checked
from tbptt_ckpt.errors import ArgumentError, shown
from tbptt_ckpt.profiling.front import pareto_front
from tbptt_ckpt.profiling.plots import draw_front, draw_windows
from tbptt_ckpt.profiling.report import MemoryReport, json_object
from tbptt_ckpt.profiling.table import table_of

SCHEMA = 2  # of the JSON; the first had no number


@dataclass(frozen=True, slots=True)
class StrategyReport:
    """Several configurations, plain BPTT among them.

    Attributes:
        rows: One report each.
        environment: Versions, processor, threads: where the figures are from.
        what: What was measured, in words: the model, and its lanes.
        command: The command line that measured it; empty where code did.
    """

    rows: tuple[MemoryReport, ...]
    environment: Mapping[str, Any] = field(default_factory=dict)
    what: str = ""
    command: str = ""

    def __str__(self) -> str:
        return self.table()

    def table(self, width: int = 80) -> str:
        """The rows as text; columns that find no place in the width are left out."""
        return table_of(self.rows, self.what, self.environment, width)

    def plot(self, ax: Any = None) -> Any:
        """Draw peak memory against time, into these axes of matplotlib's or into a new figure.

        Returns:
            The axes; their `figure` is what a notebook shows and what `savefig` writes.

        Raises:
            ArgumentError: No matplotlib, or nothing to draw.
        """
        return draw_front(self.rows, self._title(), ax)

    def plot_windows(self) -> Any:
        """Draw memory over time within one window, a panel for each row that holds its trace.

        Returns:
            A figure of matplotlib's.

        Raises:
            ArgumentError: No matplotlib, or nothing to draw: rows hold traces if asked to.
        """
        return draw_windows(self.rows, self._title())

    def _title(self) -> str:
        """What a picture is of, where it is seen without its text."""
        k1, k2 = (
            ",".join(str(k) for k in dict.fromkeys(getattr(row, name) for row in self.rows))
            for name in ("k1", "k2")
        )
        device = next((row.device for row in self.rows if row.is_ok), "cpu")
        lines = [f"{self.what or 'profile'}, k1={k1}, k2={k2}, {device}"]
        if self.environment:
            words = "torch {torch}, tbptt_ckpt {tbptt_ckpt}, {threads} threads, {processor}"
            lines.append(words.format(**self.environment))
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"StrategyReport({len(self.rows)} rows: {', '.join(r.strategy for r in self.rows)})"

    @property
    def pareto_front(self) -> tuple[MemoryReport, ...]:
        """Rows that no other row beats in both peak and time, the smallest peak first."""
        return pareto_front(self.rows)

    def to_dict(self, *, traces: bool = True) -> dict[str, Any]:
        """Plain data for JSON, with the version of its schema."""
        return {
            "schema": SCHEMA,
            "what": self.what,
            "command": self.command,
            "environment": dict(self.environment),
            "rows": [row.to_dict(trace=traces) for row in self.rows],
        }

    @classmethod
    @checked
    def from_dict(cls, plain: Mapping[str, Any]) -> StrategyReport:
        """The report that `to_dict` wrote.

        Raises:
            ArgumentError: Something else.
        """
        if not isinstance(plain.get("rows"), list):
            raise ArgumentError("this is no report of strategies: it has no list of rows")
        if plain.get("schema", SCHEMA) != SCHEMA:
            raise ArgumentError(
                f"this report has schema {shown(plain['schema'])}, and {SCHEMA} is what is read"
            )
        rows = tuple(MemoryReport.from_dict(row) for row in plain["rows"])
        words = (str(plain.get(name, "")) for name in ("what", "command"))
        return cls(rows, dict(plain.get("environment") or {}), *words)

    def to_json(self, *, traces: bool = True) -> str:
        """The report as a JSON object."""
        return json.dumps(self.to_dict(traces=traces), allow_nan=False)

    @classmethod
    @checked
    def from_json(cls, text: str) -> StrategyReport:
        """The report that `to_json` wrote."""
        return cls.from_dict(json_object(text))

    def to_csv(self) -> str:
        """The rows as CSV with a header; what was not measured is empty."""
        file = io.StringIO()
        rows = [row.to_dict(trace=False) for row in self.rows]
        names = list(MemoryReport(strategy="", k1=1, k2=1).to_dict(trace=False))
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return file.getvalue()
