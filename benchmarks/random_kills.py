"""Does a run that is killed at random times end where an undisturbed one does?

The default training job runs once undisturbed. Then the same job, with snapshots, is killed
(SIGKILL, a real process) after a random time, resumed, killed again, and so on, and at last
runs to its end. The weights it saves must be those of the undisturbed run, byte by byte.

    python -m benchmarks.random_kills --json FILE
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.report import Figure, add_output_arguments, publish

_PATIENCE = 600.0


def command(folder: Path, name: str, steps: int, *options: str) -> list[str]:
    words = [sys.executable, "-m", "tbptt_ckpt", "train", "--device", "cpu"]
    words += ["--max-steps", str(steps), "--save", str(folder / name), "--json"]
    return words + list(options)


def newest_step(snapshots: Path) -> int:
    steps = [int(p.name[5:]) for p in snapshots.glob("step-*") if p.name[5:].isdigit()]
    return max(steps, default=-1)


def killed(words: list[str], snapshots: Path, after: float, environment: dict[str, str]) -> bool:
    """Start, wait until training goes on and `after` seconds more, kill; whether it was in time."""
    log = snapshots / "events.jsonl"
    before = log.stat().st_size if log.exists() else 0
    with subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL) as process:
        begun = time.monotonic()
        while process.poll() is None and time.monotonic() - begun < _PATIENCE:
            if log.exists() and log.stat().st_size != before:
                break
            time.sleep(0.01)
        time.sleep(after)
        process.send_signal(signal.SIGKILL)
        return process.wait() == -signal.SIGKILL


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=48_000)
    parser.add_argument("--every", type=int, default=640, help="steps between snapshots")
    parser.add_argument("--longest", type=float, default=4.0, help="seconds of training at most")
    parser.add_argument("--seed", type=int, default=0)
    add_output_arguments(parser, threads=1)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.kills, arguments.steps, arguments.longest = 3, 3_200, 0.5
    return arguments


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    times = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        snapshots = folder / "snapshots"
        quiet = {"env": environment, "check": True, "capture_output": True}
        plain = subprocess.run(command(folder, "undisturbed", arguments.steps), **quiet)  # type: ignore[call-overload]
        options = ("--snapshot-dir", str(snapshots), "--snapshot-every", str(arguments.every))
        words = command(folder, "killed", arguments.steps, *options, "--resume")
        count, in_time, kept = 0, 0, []
        while count < arguments.kills:
            after = times.uniform(0.0, arguments.longest)
            fired = killed(words, snapshots, after, environment)
            count, in_time = count + 1, in_time + fired
            kept.append(newest_step(snapshots))
            print(f"kill {count} after {after:.2f} s: snapshot of step {kept[-1]}", flush=True)
            if not fired:
                break
        last = subprocess.run(words, **quiet)  # type: ignore[call-overload]
        equal = digest(folder / "undisturbed") == digest(folder / "killed")
        scores = [json.loads(run.stdout)["scores"]["after"] for run in (plain, last)]
    print(f"kills in time: {in_time}; weights equal byte by byte: {equal}")
    details = {
        "steps": arguments.steps,
        "snapshot of the first kill": kept[0],
        "of the last": kept[-1],
        "bits per byte undisturbed": scores[0],
        "killed": scores[1],
    }
    figures = [
        Figure("kills -9 while training", in_time, "kills", None, None, details),
        Figure("weights that differ in any byte", float(not equal), "runs", 0.0),
    ]
    publish("random_kills", figures, arguments)


if __name__ == "__main__":
    main()
