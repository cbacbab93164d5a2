"""Figures of a benchmark, printed as a table and written down with where they are from."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from benchmarks.environment import describe_environment


@dataclass(frozen=True)
class Figure:
    """One measured figure.

    Attributes:
        what: What was measured.
        measured: The figure.
        unit: Its unit.
        limit: The most it may be; None where nothing was promised.
        interval: Its uncertainty, or the range over which it was seen.
        details: Further numbers, by name.
    """

    what: str
    measured: float
    unit: str
    limit: float | None = None
    interval: tuple[float, float] | None = None
    details: dict[str, float] = field(default_factory=dict)

    def cells(self) -> tuple[str, ...]:
        """The figure as a row of the table."""
        low_high = f"{self.interval[0]:.4g} to {self.interval[1]:.4g}" if self.interval else ""
        limit = "" if self.limit is None else f"{self.limit:g}"
        further = ", ".join(f"{name} {value:.4g}" for name, value in self.details.items())
        return (self.what, f"{self.measured:.4g} {self.unit}", low_high, limit, further)

    def line(self) -> str:
        """The figure on a line, for those who wait."""
        return "  ".join(cell for cell in self.cells() if cell)


def add_output_arguments(parser: argparse.ArgumentParser, threads: int | None = None) -> None:
    """Options that every benchmark has.

    Args:
        parser: Gets them.
        threads: Threads torch uses by default; None leaves that to torch.
    """
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result; must be new")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument(
        "--threads", type=int, default=threads or torch.get_num_threads(), help="of torch"
    )


def publish(
    name: str,
    figures: Sequence[Figure],
    arguments: argparse.Namespace,
    *,
    interval_is: str = "95 % interval",
) -> None:
    """Print the figures with where they were measured; write them to `--json FILE`."""
    environment = describe_environment()
    print()
    print(_table(figures, interval_is))
    print()
    print("; ".join(f"{key} {value}" for key, value in environment.items()))
    if arguments.quick:
        print("--quick: tiny sizes, figures without meaning")
    if arguments.json is None:
        return
    result = {
        "benchmark": name,
        "environment": environment,
        "arguments": {k: v for k, v in vars(arguments).items() if k != "json"},
        "interval_is": interval_is,
        "figures": [asdict(figure) for figure in figures],
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    with arguments.json.open("x") as file:  # a dated result is never overwritten
        json.dump(result, file, indent=2)
        file.write("\n")
    print(f"written to {arguments.json}")


def _table(figures: Sequence[Figure], interval_is: str) -> str:
    """A table in Markdown, to be read as it is or pasted into a page."""
    header = ("what", "measured", interval_is, "limit", "further")
    rows = [header, *(figure.cells() for figure in figures)]
    used = [i for i in range(len(header)) if i < 2 or any(row[i] for row in rows[1:])]
    widths = {i: max(len(row[i]) for row in rows) for i in used}
    lines = ["| " + " | ".join(row[i].ljust(widths[i]) for i in used) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (widths[i] + 2) for i in used) + "|")
    return "\n".join(lines)
