"""Is there a size at which time batching makes a window slower?

Recomputed windows with and without time batching, on a grid of cells, lanes and widths. A
window has as many steps as take a fraction of a second, in segments of an eighth of it.
The figure that must not exceed the limit is the lower end of the interval.

    python -m benchmarks.time_batching_grid
"""

from __future__ import annotations

import argparse
import time

import torch

from benchmarks.paired import time_pairs
from benchmarks.report import Figure, add_output_arguments, publish
from benchmarks.time_batching import CELLS, Case, Size

MOST = 1.03
LANES, WIDTHS = (1, 8, 32, 128), (64, 256, 512, 1024)
_WINDOW_SECONDS = 0.08


def num_steps_of(cell: str, lanes: int, width: int) -> int:
    """Steps of a window that takes a fraction of a second."""
    case = Case(Size(cell, lanes, width, 16, 4, 1.0, 1.0))
    run = case.treated("uniform:4", False)
    run()
    begun = time.perf_counter()
    run()
    steps = 16 * _WINDOW_SECONDS / (time.perf_counter() - begun)
    return int(min(max(steps, 16), 256)) // 8 * 8


def measure(cell: str, lanes: int, width: int, arguments: argparse.Namespace) -> Figure:
    """Time with the choice over time without batching."""
    num_steps = 16 if arguments.quick else num_steps_of(cell, lanes, width)
    case = Case(Size(cell, lanes, width, num_steps, num_steps // 8, 1.0, 1.0))
    strategy = f"uniform:{max(4, num_steps // 8)}"
    choice = True if arguments.choice == "True" else arguments.choice
    times = time_pairs(
        case.treated(strategy, False),
        case.treated(strategy, choice),
        num_pairs=arguments.pairs,
        num_warmups=1,
    )
    what = f"{cell} {lanes} x {width}, {num_steps} steps"
    return Figure(what, times.ratio, "x", MOST, times.interval, times.seconds())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--choice", default="auto", choices=("auto", "True"))
    parser.add_argument("--cells", nargs="+", default=[*CELLS, "deep"])
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS)
    parser.add_argument("--lanes", nargs="+", type=int, default=LANES)
    add_output_arguments(parser)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.pairs, arguments.widths, arguments.lanes = 2, (16,), (2,)
    return arguments


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    figures = []
    for cell in arguments.cells:
        for lanes in arguments.lanes:
            for width in arguments.widths:
                figures.append(measure(cell, lanes, width, arguments))
                print(figures[-1].line(), flush=True)
    slower = [f.what for f in figures if f.interval is not None and f.interval[0] > MOST]
    print(f"slower than {MOST}: {', '.join(slower) or 'none'}")
    publish("time_batching_grid", figures, arguments)


if __name__ == "__main__":
    main()
