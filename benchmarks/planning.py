"""How long does planning take, for windows of millions of steps?

A plan is made with its predicted peak, seconds and counts, and without writing its actions. Budgets
are such that steps have to be advanced at most once, twice and three times.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time

import torch

from benchmarks.report import Figure, add_output_arguments, publish
from tbptt_ckpt import Costs, Plan, plan
from tbptt_ckpt.schedule import Curve

LIMIT_MS = {1_000_000: 50.0, 10_000_000: 500.0}
LEVELS = (1, 2, 3)

# 32 lanes of width 256. Bytes: a state (h, c), what a step of a leaf keeps, a leaf in addition.
STATE_BYTES, LEAF_BYTES = 64 << 10, 4 << 20


def cell_loop() -> Costs:
    """Straight lines: a loop over LSTMCell, 0.4 ms a step."""
    return Costs.linear(
        state_bytes=STATE_BYTES,
        step_bytes=230_000,
        leaf_bytes=LEAF_BYTES,
        step_seconds=4e-4,
        call_seconds=1e-4,
    )


def fused() -> Costs:
    """A bent curve: `nn.LSTM`, fastest per step in leaves of 32, slower in longer ones."""
    ratio = {4: 1.58, 8: 1.38, 16: 1.16, 32: 1.08, 64: 1.10, 128: 1.10}  # with the advance
    seconds = [(steps, steps * 7.8e-4 * (over - 0.3)) for steps, over in ratio.items()]
    return Costs(
        state_bytes=STATE_BYTES,
        leaf_bytes=Curve.linear(LEAF_BYTES, 700_000),
        leaf_seconds=Curve.through(seconds),
        advance_bytes=Curve.linear(0, 100_000),
        advance_seconds=Curve.linear(1e-4, 2.3e-4),
    )


def budget_for(levels: int, num_steps: int, costs: Costs) -> int:
    """A budget that needs so many levels: 5 % above what their reach asks for.

    With r levels and m bytes for states and a leaf, the reach is about
    m^(r+1) / ((r+1)! a s^r).
    """
    a, s = costs.leaf_bytes.slope, costs.state_bytes
    free = (math.factorial(levels + 1) * a * s**levels * num_steps) ** (1 / (levels + 1))
    return int(1.05 * free + 2 * a + costs.leaf_bytes(0))


def time_plan(num_steps: int, costs: Costs, budget: int, repeats: int) -> tuple[Plan, list[float]]:
    """A plan, and milliseconds of making it."""
    milliseconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        planned = plan(num_steps, costs, budget_bytes=budget)
        milliseconds.append(1e3 * (time.perf_counter() - begun))
    return planned, milliseconds


def measure(name: str, costs: Costs, num_steps: int, levels: int, repeats: int) -> Figure:
    budget = budget_for(levels, num_steps, costs)
    plan(num_steps, costs, budget_bytes=budget)  # warm
    planned, milliseconds = time_plan(num_steps, costs, budget, repeats)
    figure = Figure(
        f"{name}, {num_steps:,} steps, {levels} level{'s' if levels > 1 else ''}",
        statistics.median(milliseconds),
        "ms",
        LIMIT_MS.get(num_steps),
        (min(milliseconds), max(milliseconds)),
        {
            "budget_mib": budget / 2**20,
            "peak_mib": (planned.predicted_peak_bytes or 0) / 2**20,
            "levels": planned.num_levels,
            "executed_per_step": planned.executed_steps / num_steps,
            "leaves": planned.num_leaves,
            "states": planned.num_boundaries,
            "nodes": sum(len(block.how.nodes) for block in planned.blocks),
        },
    )
    print(figure.line(), flush=True)
    return figure


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    add_output_arguments(parser, threads=1)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.repeats = 1
    return arguments


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    sizes = (10_000,) if arguments.quick else tuple(LIMIT_MS)
    figures = [
        measure(name, costs, num_steps, levels, arguments.repeats)
        for name, costs in (("LSTMCell loop", cell_loop()), ("nn.LSTM", fused()))
        for num_steps in sizes
        for levels in LEVELS
    ]
    publish("planning", figures, arguments, interval_is="fastest to slowest")


if __name__ == "__main__":
    main()
