"""Does `k2="auto"` learn what the best fixed k2 learns, and in what time?

Delayed recall (see `delayed_recall.py`) with 12 steps from a cue to its answer, with 24, and with a
change from 12 to 24 in the middle of training; from weights that are blind to cues and from torch's
own; against fixed k2 and against `max_k2`. Seconds are of the process, its audits included.

    python -m benchmarks.auto_k2
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.delayed_recall import Recaller, accuracy, recall_loss, recall_stream
from benchmarks.report import Figure, add_output_arguments, publish
from tbptt_ckpt import TBPTT, TensorSequence

K1, MAX_K2 = 4, 64


@dataclass(frozen=True)
class Outcome:
    """One run: percent right at its end on a stream of its own, and what it took."""

    right: float
    cpu_seconds: float
    mean_k2: float
    audits: float  # share of the updates


def stream(delays: tuple[int, ...], num_steps: int, lanes: int, seed: int) -> TensorSequence:
    """As many steps of each delay, one after the other."""
    each = num_steps // len(delays)
    parts = [recall_stream(each, lanes, d, seed + 2000 * i) for i, d in enumerate(delays)]
    columns = [(p.inputs, p.targets, p.weight) for p in parts]
    inputs, targets, weight = (torch.cat(column) for column in zip(*columns, strict=True))
    return TensorSequence(inputs, targets, weight=weight)


def run(
    k2: Any, delays: tuple[int, ...], start: str, given: argparse.Namespace, seed: int
) -> Outcome:
    torch.manual_seed(seed)
    model = Recaller(given.width, start == "blind")
    optimizer = torch.optim.Adam(model.parameters(), lr=given.lr)
    rule = {"max_k2": MAX_K2, "k2_window_tolerance": given.window_tolerance}
    tbptt = TBPTT(
        *(model, recall_loss, K1, k2, optimizer),
        **{"per_step": False, "clip_grad_norm": 1.0, "strategy": "retain"},
        **(rule if k2 == "auto" else {}),
    )
    steps = stream(delays, given.steps, given.lanes, 1000 + seed)
    begun = time.process_time()
    windows = [(w.stop - w.start, w.chosen_k2) for w in tbptt.windows(steps) if w.updated]
    seconds = time.process_time() - begun
    held_out = recall_stream(8_000, given.lanes, delays[-1], 2000 + seed)
    reached = sum(reach for reach, _ in windows) / len(windows)
    audits = sum(chosen.is_audit for _, chosen in windows if chosen is not None)
    return Outcome(accuracy(model, held_out), seconds, reached, audits / len(windows))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30_000, help="time steps per lane")
    parser.add_argument("--lanes", type=int, default=32)
    parser.add_argument("--width", type=int, default=48)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each setting")
    parser.add_argument("--delays", nargs="+", default=["12", "24", "12,24"])
    parser.add_argument("--starts", nargs="+", default=["blind", "default"])
    parser.add_argument("--k2", nargs="+", default=["auto", "16", "28", "64"])
    parser.add_argument("--window-tolerance", type=float, help="of single windows (default: none)")
    add_output_arguments(parser, threads=1)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps, arguments.seeds, arguments.delays = 400, 1, ["3,6"]
    return arguments


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    figures = []
    for text in arguments.delays:
        delays = tuple(map(int, text.split(",")))
        for start in arguments.starts:
            for name in arguments.k2:
                k2 = name if name == "auto" else int(name)
                runs = [run(k2, delays, start, arguments, seed) for seed in range(arguments.seeds)]
                rights = sorted(outcome.right for outcome in runs)
                figure = Figure(
                    what=f"delay {' then '.join(map(str, delays))}, {start} start, k2 = {name}",
                    measured=sum(rights) / len(rights),
                    unit="% right",
                    interval=(rights[0], rights[-1]),
                    details={
                        "CPU seconds": sum(o.cpu_seconds for o in runs) / len(runs),
                        "mean reach": sum(o.mean_k2 for o in runs) / len(runs),
                        "audits, % of updates": 100 * sum(o.audits for o in runs) / len(runs),
                    },
                )
                figures.append(figure)
                print(figure.line(), flush=True)
    publish("auto_k2", figures, arguments, interval_is="least and most over the seeds")


if __name__ == "__main__":
    main()
