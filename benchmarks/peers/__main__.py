"""How do time and peak memory compare with the field's other ways of doing the same work?

One forward and backward of an LSTM over a byte sequence, the same weights and data for all,
in fresh processes, interleaved; and the planner alone against checkpoint_schedules.

    pip install -e '.[bench]'
    python -m benchmarks.peers --json benchmarks/results/$(date +%F)-peers.json

A full run is long. `--records FOLDER --minutes 3` does a piece of it; the same
command again goes on from there. Only `--parts times` needs a quiet machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.peers import campaign, planners, plot, summary
from benchmarks.peers.entries import BASELINE, ENTRIES, Entry
from benchmarks.peers.work import Size
from benchmarks.report import add_output_arguments, print_origin, write_result
from tbptt_ckpt.profiling.environment import describe_environment

DISTRIBUTIONS = ("jax", "jaxlib", "equinox", "pytorch-ignite", "checkpoint-schedules", "numba")
SHAPES = ((256, 32), (512, 8))  # width, lanes
LENGTHS, QUICK_LENGTHS = (1_000, 10_000), (48,)
PLANNED_LENGTHS, QUICK_PLANNED_LENGTHS = (1_000, 10_000, 100_000, 1_000_000), (100,)
SLOTS = (20, 100)
PLANNER_LIMIT_SECONDS = 60.0
PARTS = ("peaks", "times", "planners")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--only", nargs="+", metavar="KEY", help="entries; the baseline always")
    parser.add_argument("--steps", nargs="+", type=int, default=LENGTHS, help="lengths")
    parser.add_argument("--widths", nargs="+", type=int, default=[w for w, _ in SHAPES])
    parser.add_argument("--rounds", type=int, default=3, help="processes of each up to 1,000 steps")
    parser.add_argument("--runs", type=int, default=2, help="timed in each of these processes")
    parser.add_argument("--long-rounds", type=int, default=1, help="longer ones, of one run each")
    parser.add_argument("--records", type=Path, metavar="FOLDER", help="to go on from")
    parser.add_argument("--minutes", type=float, help="start nothing after that")
    parser.add_argument(
        "--most-seconds", type=float, default=600.0, help="of one process, which is stopped then"
    )
    add_output_arguments(parser)
    return parser.parse_args()


def chosen_entries(only: Sequence[str] | None) -> list[Entry]:
    """Those that take part; a line for each that cannot."""
    known = {entry.key for entry in ENTRIES}
    unknown = sorted(set(only or ()) - known)
    if unknown:
        raise SystemExit(f"--only {' '.join(unknown)}: not among {', '.join(sorted(known))}")
    entries = []
    for entry in ENTRIES:
        if only is not None and entry.key not in only and entry != BASELINE:
            continue
        if entry.missing:
            print(f"{entry.label}: left out, {', '.join(entry.missing)} is not installed")
        else:
            entries.append(entry)
    return entries


def chosen_sizes(arguments: argparse.Namespace) -> list[Size]:
    if arguments.quick:
        return [Size(16, 2, steps) for steps in QUICK_LENGTHS]
    shapes = [shape for shape in SHAPES if shape[0] in arguments.widths]
    return [Size(width, lanes, steps) for steps in arguments.steps for width, lanes in shapes]


def measure(arguments: argparse.Namespace, entries: list[Entry], records: campaign.Records) -> bool:
    """Do the runs that are left; False if there was not enough time."""
    sizes = chosen_sizes(arguments)
    short = [size for size in sizes if size.num_steps <= min(LENGTHS)]
    long = [size for size in sizes if size not in short]
    rounds, runs = (1, 1) if arguments.quick else (arguments.rounds, arguments.runs)
    clock = campaign.Clock(arguments.minutes)
    jobs: list[tuple[Iterable[campaign.Job], int]] = []
    if "peaks" in arguments.parts:
        jobs.append((campaign.peaks(entries, sizes), 1))
    if "times" in arguments.parts:
        jobs.append((campaign.rounds(entries, short, rounds), runs))
        jobs.append((campaign.rounds(entries, long, arguments.long_rounds), 1))
    return all(
        campaign.run(
            some,
            records,
            num_runs=num_runs,
            threads=arguments.threads,
            clock=clock,
            most_seconds=arguments.most_seconds,
        )
        for some, num_runs in jobs
    )


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)  # as in the measured processes, for the report
    entries = chosen_entries(arguments.only)
    with tempfile.TemporaryDirectory() as folder:
        records = campaign.Records(arguments.records or Path(folder))
        if not measure(arguments, entries, records):
            raise SystemExit("unfinished: the same command goes on from here")
        planned = planned_results(arguments, records)
        publish(arguments, entries, records, planned)


def planned_results(arguments: argparse.Namespace, records: campaign.Records) -> list[dict]:
    if "planners" not in arguments.parts:
        return records.load("planners")
    for line in planners.missing():
        print(line)
    lengths = QUICK_PLANNED_LENGTHS if arguments.quick else PLANNED_LENGTHS
    results = planners.measure_all(lengths, SLOTS, PLANNER_LIMIT_SECONDS)
    records.save("planners", results)
    return results


def publish(
    arguments: argparse.Namespace,
    entries: list[Entry],
    records: campaign.Records,
    planned: list[dict],
) -> None:
    """Print the tables; with `--json FILE` write it, and a page and a plot beside it."""
    sizes = chosen_sizes(arguments)
    rows, failures = summary.rows_of(records, entries, sizes)
    environment = describe_environment(*DISTRIBUTIONS)
    page = summary.page(rows, failures, sizes)
    if planned:
        page += f"\n## The planner alone\n\n{planners.table(planned)}\n"
    print(page)
    print_origin(environment, arguments)
    if arguments.json is None:
        return
    measured = [{"job": asdict(job), "result": result} for job, result in records.results.items()]
    payload = {"measured": measured, "failures": failures, "planners": planned}
    write_result("peers", environment, arguments, payload)
    where = "; ".join(f"{key} {value}" for key, value in environment.items())
    arguments.json.with_suffix(".md").write_text(f"# Peers\n\n{where}\n\n{page}")
    if not find_spec("matplotlib"):
        print("no plot: matplotlib is not installed")
    elif rows:
        plot.draw(rows, arguments.json.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(main())
