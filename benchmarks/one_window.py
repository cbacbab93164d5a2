"""What does one window hold while it runs, beside plain BPTT?

The `LSTMCell` loop of `recomputation.py`, one window over all steps: live bytes of tensors from its
begin to its end, above weights, inputs and `.grad`. The picture has both on one axis of bytes; time
is in percent of each: metering is not free, and `recomputation.py` is there for times.

    python -m benchmarks.one_window --plot docs/one-window.png
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.recomputation import ByteCell, Case, gradients_of
from benchmarks.report import add_output_arguments, markdown_table, print_origin, write_result
from tbptt_ckpt.memory import peak_memory
from tbptt_ckpt.profiling.environment import describe_environment

POINTS = 500
Timeline = list[tuple[float, int]]


def timeline_of(run: Callable[[], float]) -> Timeline:
    """(seconds, live bytes) in the second of two runs; its peak is among them."""
    run()
    with peak_memory(rss=False) as memory:
        run()
    return thinned(memory.timeline, POINTS)


def thinned(timeline: Sequence[tuple[float, int]], most: int) -> Timeline:
    """The highest and the lowest point of each stretch."""
    size = -(-2 * len(timeline) // most)
    kept: set[tuple[float, int]] = {timeline[0], timeline[-1]}
    for start in range(0, len(timeline), size):
        stretch = timeline[start : start + size]
        kept |= {max(stretch, key=lambda p: p[1]), min(stretch, key=lambda p: p[1])}
    return sorted(kept)


def measure(arguments: argparse.Namespace) -> dict[str, Timeline]:
    """Both ways, after their gradients were compared."""
    torch.manual_seed(0)
    shape = (arguments.steps, arguments.lanes)
    case = Case(
        ByteCell(arguments.width),
        torch.randn(*shape, arguments.width),
        torch.randint(0, 256, shape),
        arguments.segment,
    )
    ours = case.recomputed("replay", time_batching=False)  # the picture is of a loop
    expected, found = gradients_of(case, case.plain), gradients_of(case, ours)
    assert (found - expected).norm() <= 1e-4 * expected.norm(), "not the same gradient"
    return {"plain BPTT": timeline_of(case.plain), "tbptt_ckpt": timeline_of(ours)}


def draw(
    lines: Mapping[str, Timeline],
    arguments: argparse.Namespace,
    environment: Mapping[str, Any],
    path: Path,
) -> None:
    """One axis for both, with what was run and where in the title."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(7.6, 3.3), dpi=150, layout="constrained")
    axes = picture.add_subplot()
    for (name, line), colour in zip(lines.items(), ("#777777", "#0072b2"), strict=True):
        seconds, live = zip(*line, strict=True)
        times = [100 * s / seconds[-1] for s in seconds]
        mib = [num_bytes / 2**20 for num_bytes in live]
        axes.fill_between(times, mib, step="post", color=colour, alpha=0.25, linewidth=0)
        axes.step(times, mib, where="post", color=colour, linewidth=1.1)
        peak = max(range(len(mib)), key=mib.__getitem__)
        axes.annotate(
            f"{name}: {mib[peak]:.1f} MiB",
            (times[peak], mib[peak]),
            xytext=(8, 2),
            textcoords="offset points",
            color=colour,
            weight="bold",
        )
    axes.set_xlim(0, 100)
    axes.set_ylim(0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("time since the window began, % of what it takes")
    axes.set_ylabel("tensor memory, MiB")
    axes.set_title(
        f"One window of {arguments.steps:,} steps: LSTMCell, {arguments.lanes} lanes, width "
        f"{arguments.width}, uniform:{arguments.segment}\ntorch {environment['torch']}, "
        f"{environment['processor']}, {arguments.threads} thread{'s' * (arguments.threads > 1)}",
        fontsize=9,
        loc="left",
    )
    FigureCanvasAgg(picture).print_figure(str(path))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--lanes", type=int, default=32)
    parser.add_argument("--width", type=int, default=256, help="of inputs and state")
    parser.add_argument("--segment", type=int, default=32, help="steps recomputed as one piece")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the picture")
    add_output_arguments(parser)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps, arguments.lanes, arguments.width, arguments.segment = 64, 2, 16, 8
    return arguments


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    lines, environment = measure(arguments), describe_environment()
    rows = [
        (name, f"{max(live for _, live in line) / 2**20:.1f}", f"{line[-1][0]:.2f}")
        for name, line in lines.items()
    ]
    print(markdown_table(("", "peak, MiB", "seconds, metered"), rows))
    print_origin(environment, arguments)
    if arguments.plot is not None:
        draw(lines, arguments, environment, arguments.plot)
    if arguments.json is not None:
        write_result("one_window", environment, arguments, {"timelines": lines})


if __name__ == "__main__":
    main()
