"""How fast does this machine multiply by a weight, at the shapes of a recurrent step?

The arithmetic floor of time batching: products of a step with the weight of an LSTM's state
and back, and the product over the steps of a segment that makes the weight's gradient, by
torch's own `mm` and by the kernel that time batching chooses. Multiply-adds count as two.

    python -m benchmarks.products
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from benchmarks.paired import time_pairs
from benchmarks.report import Figure, add_output_arguments, publish
from tbptt_ckpt.time_batching.products import add_weight_gradient, multiply, multiply_back

SHAPES = ((8, 512), (16, 1024), (32, 256), (8, 256), (1, 512), (128, 256))
SEGMENT = 32


def figures_of(lanes: int, width: int, num_pairs: int) -> list[Figure]:
    """Rates of the three products at one shape."""
    weight = torch.randn(4 * width, width)
    h, gates = torch.randn(lanes, width), torch.randn(lanes, 4 * width)
    all_h, all_gates = h.repeat(SEGMENT, 1), gates.repeat(SEGMENT, 1)
    ways: dict[str, tuple[Callable[[], object], Callable[[], object], int]] = {
        "forward": (lambda: torch.mm(h, weight.t()), lambda: multiply(h, weight), 1),
        "back": (lambda: torch.mm(gates, weight), lambda: multiply_back(gates, weight), 1),
        f"gradient of {SEGMENT} steps": (
            lambda: torch.mm(all_gates.t(), all_h),
            lambda: add_weight_gradient(None, all_gates, all_h),
            SEGMENT,
        ),
    }
    figures = []
    for name, (plain, chosen, steps) in ways.items():
        operations = 2 * steps * lanes * weight.numel()
        repeats = min(max(1, int(2e9 / operations)), 2000)
        times = time_pairs(repeated(plain, repeats), repeated(chosen, repeats), num_pairs)
        rates = {
            "GFLOP/s of mm": operations * repeats / times.seconds()["baseline s"] / 1e9,
            "GFLOP/s of the chosen": operations * repeats / times.seconds()["treated s"] / 1e9,
            "us a step, chosen": 1e6 * times.seconds()["treated s"] / repeats / steps,
        }
        what = f"{lanes} x {width}, {name}: time of the chosen over mm"
        figures.append(Figure(what, times.ratio, "x", None, times.interval, rates))
        print(figures[-1].line(), flush=True)
    return figures


def repeated(work: Callable[[], object], repeats: int) -> Callable[[], None]:
    """The work so many times, without a graph."""

    def run() -> None:
        with torch.no_grad():
            for _ in range(repeats):
                work()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=9)
    add_output_arguments(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    shapes = ((2, 16),) if arguments.quick else SHAPES
    figures = [f for shape in shapes for f in figures_of(*shape, arguments.pairs)]
    publish("products", figures, arguments)


if __name__ == "__main__":
    main()
