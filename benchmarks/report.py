"""Figures of a benchmark, printed as a table and written down with where they are from."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from tbptt_ckpt.profiling.environment import describe_environment


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
    print(_figure_table(figures, interval_is))
    print()
    print_origin(environment, arguments)
    if arguments.json is None:
        return
    payload = {"interval_is": interval_is, "figures": [asdict(figure) for figure in figures]}
    write_result(name, environment, arguments, payload)


def print_origin(environment: Mapping[str, object], arguments: argparse.Namespace) -> None:
    """Where the figures above are from, and whether they mean anything."""
    print("; ".join(f"{key} {value}" for key, value in environment.items()))
    if arguments.quick:
        print("--quick: tiny sizes, figures without meaning")


def write_result(
    name: str,
    environment: Mapping[str, object],
    arguments: argparse.Namespace,
    payload: Mapping[str, object],
) -> None:
    """Write a result to `--json FILE`, which must be new."""
    result = {
        "benchmark": name,
        "environment": environment,
        "arguments": {k: v for k, v in vars(arguments).items() if k != "json"},
        **payload,
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    with arguments.json.open("x") as file:  # a dated result is never overwritten
        json.dump(result, file, indent=2, default=str)
        file.write("\n")
    print(f"written to {arguments.json}")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, to be read as it is or pasted into a page."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    texts = [
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    ]
    texts.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(texts)


def _figure_table(figures: Sequence[Figure], interval_is: str) -> str:
    """The columns that some figure fills."""
    header = ("what", "measured", interval_is, "limit", "further")
    rows = [figure.cells() for figure in figures]
    used = [i for i in range(len(header)) if i < 2 or any(row[i] for row in rows)]
    return markdown_table([header[i] for i in used], [[row[i] for i in used] for row in rows])
