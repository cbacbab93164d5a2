"""Is any replay that is right called wrong?

Windows of at most 16 steps of trainings whose replays differ, if at all, by what is right: a
chaotic state, bfloat16, leaves that are cut otherwise or have another form than advances, noise of
the size of TF32 and of atomics. Counted are the alarms, and beside them how many states were
compared and how many differences had to be settled, without which no alarm would say nothing. The
same trainings with a count that the module keeps on itself are the control: each must be found.

    python -m benchmarks.false_alarms --windows 100000
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.report import Figure, add_output_arguments, publish
from benchmarks.right_replays import SITUATIONS, Situation
from tbptt_ckpt.errors import ReplayMismatchError
from tbptt_ckpt.executor.compared_states import ComparedStates
from tbptt_ckpt.executor.settlement import Settlement

OF_A_TRAINING = 1000  # windows; then another one, from other weights
FAULTY_WINDOWS = 100  # within which a fault must be found


@dataclass
class Counts:
    """What windows came to."""

    windows: int = 0
    alarms: int = 0
    compared: int = 0
    settled: int = 0


@contextmanager
def counting(counts: Counts) -> Iterator[None]:
    """Count the states that are compared, and the differences that are settled."""
    takes, settle = ComparedStates.takes, Settlement.settle

    def counted_takes(self: ComparedStates, *arguments: Any) -> bool:
        taken = takes(self, *arguments)
        counts.compared += taken
        return taken

    def counted_settle(self: Settlement, *arguments: Any) -> None:
        counts.settled += 1
        settle(self, *arguments)

    with (
        patch.object(ComparedStates, "takes", counted_takes),
        patch.object(Settlement, "settle", counted_settle),
    ):
        yield


def run(situation: Situation, num_windows: int, seed: int = 0) -> Counts:
    """Run so many windows; after an alarm goes on with another training."""
    counts = Counts()
    with counting(counts):
        while counts.windows < num_windows:
            left = min(OF_A_TRAINING, num_windows - counts.windows)
            try:
                for _ in situation.windows(seed, left):
                    counts.windows += 1
            except ReplayMismatchError as error:
                counts.windows, counts.alarms = counts.windows + 1, counts.alarms + 1
                print(f"seed {seed}: {error}", flush=True)
            seed += 1
    return counts


def found_faults(situation: Situation, num_trainings: int) -> int:
    """In how many trainings a module that counts on itself is found."""
    found = 0
    for seed in range(num_trainings):
        try:
            for _ in situation.windows(seed, FAULTY_WINDOWS, faulty=True):
                pass
        except ReplayMismatchError:
            found += 1
    return found


def measure(name: str, arguments: argparse.Namespace) -> Figure:
    situation, begun = SITUATIONS[name], time.process_time()
    counts = run(situation, arguments.windows, arguments.seed)
    taken = time.process_time() - begun
    details = {
        "windows": counts.windows,
        "states compared": counts.compared,
        "differences settled": counts.settled,
        "faulty trainings": arguments.faults,
        "of these found": found_faults(situation, arguments.faults),
        "ms of CPU a window": 1e3 * taken / counts.windows,
    }
    figure = Figure(name, counts.alarms, "alarms", 0.0, None, details)
    print(figure.line(), flush=True)
    return figure


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=100_000, help="of each kind")
    parser.add_argument("--faults", type=int, default=20, help="faulty trainings of each kind")
    parser.add_argument("--only", nargs="+", default=list(SITUATIONS), choices=list(SITUATIONS))
    parser.add_argument("--seed", type=int, default=0, help="of the first training")
    add_output_arguments(parser, threads=1)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    if arguments.quick:
        arguments.windows, arguments.faults = 5, 1
    publish("false_alarms", [measure(name, arguments) for name in arguments.only], arguments)


if __name__ == "__main__":
    main()
