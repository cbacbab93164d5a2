"""One measured process: does the work of one entry, prints one line of JSON.

python -m benchmarks.peers.measured_peer plain-cell --width 256 --lanes 32 --steps 1000
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
from pathlib import Path

import numpy as np

from benchmarks.paired import timed
from benchmarks.peers.entries import BASELINE, entry_of
from benchmarks.peers.protocol import Peer
from benchmarks.peers.work import Arrays, Size, make_work, relative_error

MOST_ERROR = 1e-4
FULL_WARMUP_STEPS = 1000


def measure(peer: Peer, num_runs: int, *, warm_run: bool) -> dict[str, object]:
    """Seconds of runs, and the rise of resident memory in the first of all runs."""
    peer.warm_up()
    before = _reset_high_water()
    seconds = [timed(peer.run)]
    rise = _status_bytes("VmHWM") - before
    if warm_run:
        seconds.clear()
    seconds += [timed(peer.run) for _ in range(num_runs - len(seconds))]
    return {"seconds": seconds, "rss_rise_bytes": rise}


def gradient_error(peer: Peer, reference: Path, *, is_baseline: bool) -> float:
    """How far the gradient is from the baseline's, which is the first to run and writes it."""
    gradients = peer.gradients()
    if is_baseline and not reference.exists():
        np.savez(reference, **gradients)
    error = relative_error(gradients, _read(reference))
    if not error <= MOST_ERROR:
        raise SystemExit(f"gradients differ by {error:.1e}, so the rest means nothing")
    return error


def _read(reference: Path) -> Arrays:
    with np.load(reference) as file:
        return dict(file)


def _reset_high_water() -> int:
    """Give free heap back, reset the kernel's mark; bytes that are resident now."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("entry")
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--lanes", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--what", choices=("peak", "time"), required=True)
    parser.add_argument("--budget-bytes", type=int, help="of temporaries")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--reference", type=Path, required=True, help="the baseline's gradients")
    parser.add_argument("--threads", type=int, required=True)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    # Before any framework starts its threads: both torch and XLA take the cores they see.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    entry = entry_of(arguments.entry)
    size = Size(arguments.width, arguments.lanes, arguments.steps)
    peer = entry.make(make_work(size), arguments.budget_bytes)
    if arguments.what == "peak":
        peer.warm_up()
        result: dict[str, object] = {"peak_bytes": peer.peak_bytes()}
    else:
        result = measure(peer, arguments.runs, warm_run=arguments.steps <= FULL_WARMUP_STEPS)
        error = gradient_error(peer, arguments.reference, is_baseline=entry == BASELINE)
        result["gradient_error"] = error
    print(json.dumps(result))


if __name__ == "__main__":
    main()
