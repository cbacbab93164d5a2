"""Is host memory flat in the reach of an update?

Full BPTT (one window, `k2=None`) through sequences of very different lengths, each in a
process of its own, with anonymous resident memory (RssAnon) sampled every 5 ms:

- an LSTMCell loop fed by a plain generator of steps, ten times as long: how much higher is
  the peak?
- `nn.LSTM` over a million memory-mapped steps: how much does the loaded process rise? Where
  the C library puts blocks differs from process to process, so several are run, and the
  highest rise counts.

Pages of the mapped files are resident too, but the kernel can drop them; they are reported
beside it. The control retains everything, which shows what the figure would be otherwise.

    python -m benchmarks.host_memory
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch

from benchmarks.measured_process import write_files
from benchmarks.report import Figure, add_output_arguments, publish

MIB = 2**20
LIMIT_CELL_MIB, LIMIT_FUSED_MIB = 60.0, 150.0
REPOSITORY = Path(__file__).resolve().parent.parent


def measured(
    case: str, num_steps: int, strategy: str, threads: int, folder: str = "."
) -> dict[str, float]:
    """What a fresh process reports about one case."""
    command = [sys.executable, "-m", "benchmarks.measured_process", case]
    command += ["--steps", str(num_steps), "--strategy", strategy]
    command += ["--folder", folder, "--threads", str(threads)]
    done = subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    if (figures["num_steps"], figures["num_windows"]) != (num_steps, 1):
        raise SystemExit(f"{case}: not one window of {num_steps} steps: {figures}")
    return figures


def growth(
    what: str, lengths: tuple[int, int], strategy: str, limit: float | None, threads: int
) -> Figure:
    """How much higher the peak of a longer LSTMCell loop is."""
    short, long = (measured("cell", length, strategy, threads) for length in lengths)
    return Figure(
        f"{what}, {lengths[1]:,} over {lengths[0]:,} steps",
        (long["anonymous_peak"] - short["anonymous_peak"]) / MIB,
        "MiB",
        limit,
        None,
        {
            "peak of the short MiB": short["anonymous_peak"] / MIB,
            "of the long MiB": long["anonymous_peak"] / MIB,
            "seconds": long["seconds"],
        },
    )


def rise(num_steps: int, strategy: str, threads: int, folder: str | None, runs: int) -> Figure:
    """How much loaded and warm processes rise, at most, in a long pass of `nn.LSTM`."""
    with tempfile.TemporaryDirectory(dir=folder) as files:
        write_files(Path(files), num_steps)
        processes = [measured("fused", num_steps, strategy, threads, files) for _ in range(runs)]
    rises = [(p["anonymous_peak"] - p["anonymous_before"]) / MIB for p in processes]
    highest = processes[rises.index(max(rises))]
    return Figure(
        f"nn.LSTM, {num_steps:,} mapped steps over the loaded process, highest of {runs}",
        max(rises),
        "MiB",
        LIMIT_FUSED_MIB,
        (min(rises), max(rises)),
        {
            "median MiB": median(rises),
            "loaded MiB": highest["anonymous_before"] / MIB,
            "file-backed before MiB": highest["file_backed_before"] / MIB,
            "after MiB": highest["file_backed_after"] / MIB,
            "seconds": highest["seconds"],
        },
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="factor on all lengths")
    # "auto" would take what is free, since that is faster; here memory is what counts.
    parser.add_argument("--strategy", default="sqrt")
    parser.add_argument("--runs", type=int, default=20, help="processes of nn.LSTM")
    parser.add_argument("--folder", help="for the mapped files, 72 MB; a real disk, not tmpfs")
    add_output_arguments(parser, threads=1)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.scale, arguments.runs = 0.01, 2
    return arguments


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)  # as in the measured processes, for the report
    strategy, threads = arguments.strategy, arguments.threads

    def scaled(num_steps: int) -> int:
        return max(1, round(num_steps * arguments.scale))

    lengths = scaled(10_000), scaled(100_000)
    shorter = scaled(1_000), scaled(10_000)
    figures = []
    for make in (
        lambda: growth("LSTMCell loop", lengths, strategy, LIMIT_CELL_MIB, threads),
        lambda: rise(scaled(1_000_000), strategy, threads, arguments.folder, arguments.runs),
        lambda: growth("control: retain, LSTMCell loop", shorter, "retain", None, threads),
    ):
        figures.append(make())
        print(figures[-1].line(), flush=True)
    publish("host_memory", figures, arguments, interval_is="range")


if __name__ == "__main__":
    main()
