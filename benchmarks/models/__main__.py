"""Which public models train by windows as they are, with a wrapper, or not at all?

Each is trained over 32 steps with k1=6 and k2=15 by six strategies, both executors and every
`time_batching`, and the gradients of every window are compared with a plain loop's that retains it.
Libraries that are not installed are left out.

    python -m benchmarks.models
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from importlib import metadata

import torch

from benchmarks.models import of_libraries, of_torch, of_transformers
from benchmarks.models.grid import QUICK, STRATEGIES, Verdict, judged
from benchmarks.models.model import Model
from benchmarks.report import print_origin
from tbptt_ckpt.profiling.environment import describe_environment

MODELS = [*of_torch.MODELS, *of_libraries.MODELS, *of_transformers.MODELS]
HEADER = ("model", "library", "lines written", "result", "exact runs", "largest error")


def results(models: list[Model], strategies: tuple[str, ...]) -> Iterator[tuple[Model, Verdict]]:
    """Of each whose library is there."""
    for model in models:
        started = time.perf_counter()
        try:
            verdict = judged(model, strategies)
        except ImportError as error:
            print(f"{model.library} is left out: {error}", file=sys.stderr)
            continue
        seconds = time.perf_counter() - started
        print(f"{model.name}: {verdict.text} ({seconds:.0f} s)", file=sys.stderr, flush=True)
        yield model, verdict


def row(model: Model, verdict: Verdict) -> tuple[str, ...]:
    """A line of the table."""
    said = verdict.text if len(verdict.text) < 240 else f"{verdict.text[:240]} ..."
    if model.note:
        said = f"{said}: {model.note}"
    return (
        model.name,
        f"{model.library} {metadata.version(model.library)}",
        verdict.lines,
        said.replace("|", "\\|"),
        f"{verdict.exact}/{verdict.runs}",
        f"{verdict.worst:.0e}" if verdict.exact else "",
    )


def main(given: list[str] | None = None) -> int:
    """Print the table; 1 if a gradient is wrong or an error is not the package's own."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models")
    parser.add_argument("--only", default="", help="names or libraries that contain this")
    parser.add_argument("--quick", action="store_true", help="two strategies: does it run at all?")
    arguments = parser.parse_args(given)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    wanted = arguments.only.lower()
    models = [model for model in MODELS if wanted in f"{model.library} {model.name}".lower()]
    print_row(HEADER)
    print_row(["---"] * len(HEADER))
    faulty = 0
    for model, verdict in results(models, QUICK if arguments.quick else STRATEGIES):
        print_row(row(model, verdict))
        faulty += bool(verdict.faults)
    print()
    print_origin(describe_environment(), arguments)
    return int(faulty > 0)


def print_row(cells: Sequence[str]) -> None:
    """At once: a whole table takes half an hour."""
    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
