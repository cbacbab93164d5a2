"""Does the memory of a long run stay where it was after its first minute?

`tbptt-ckpt train` on the default text, in a process of its own, with a snapshot every minute.
Resident memory is read from outside, once a second. At the end SIGTERM stops the run, which
must save and exit with 143.

    python -m benchmarks.steady_memory --json FILE --plot FILE
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.report import Figure, add_output_arguments, publish

MIB = 2**20
LIMIT = 1.05
FIELDS = {"VmRSS": "resident", "RssAnon": "anonymous", "RssFile": "file_backed"}


def resident_mib(pid: int) -> dict[str, float]:
    """Resident memory of a process, by kind."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    pairs = dict(line.split(":", 1) for line in lines)
    return {name: int(pairs[key].split()[0]) / 1024 for key, name in FIELDS.items()}


def is_stopped(pid: int) -> bool:
    """Whether a process does not run because of a signal."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def watch(process: subprocess.Popen[bytes], seconds: float) -> list[dict[str, float]]:
    """A sample a second until the time is up or SIGTERM arrives; the process must live that long.

    While somebody has stopped the process (SIGSTOP), time does not count.
    """
    elapsed, samples = 0.0, []
    asked_to_end = []
    signal.signal(signal.SIGTERM, lambda *_: asked_to_end.append(True))
    last = time.monotonic()
    while elapsed < seconds and not asked_to_end:
        if process.poll() is not None:
            raise SystemExit(f"the run ended after {elapsed:.0f} s with {process.returncode}")
        now = time.monotonic()
        if not is_stopped(process.pid):
            elapsed += now - last
            samples.append({"seconds": round(elapsed, 1), **resident_mib(process.pid)})
        last = now
        time.sleep(1.0)
    while is_stopped(process.pid):
        time.sleep(1.0)
    return samples


def run(folder: Path, seconds: float, minutes: float, threads: int) -> dict[str, object]:
    """Train for `seconds`, stop, and give the samples with what the log counted."""
    log = folder / "snapshots"
    command = [sys.executable, "-m", "tbptt_ckpt", "train", "--device", "cpu"]
    command += ["--max-steps", str(10**9), "--snapshot-dir", str(log)]
    command += ["--snapshot-minutes", str(minutes)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as process:
        try:
            samples = watch(process, seconds)
            process.send_signal(signal.SIGTERM)
            message = process.communicate(timeout=600)[1].decode().strip()
        finally:
            process.kill()
    lines = (log / "events.jsonl").read_text().splitlines()
    return {
        "samples": samples,
        "code": process.returncode,
        "message": message,
        "windows": sum('"event": "window"' in line for line in lines),
        "snapshots": sum('"kind": "snapshot"' in line for line in lines),
    }


def plot(samples: list[dict[str, float]], first: float, path: Path) -> None:
    """Resident memory over time, with the band of 5 % around its value after a minute."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    minutes = [sample["seconds"] / 60 for sample in samples]
    figure, axes = plt.subplots(figsize=(8, 4))
    for name in FIELDS.values():
        axes.plot(minutes, [sample[name] for sample in samples], label=name.replace("_", "-"))
    axes.axhspan(0.95 * first, 1.05 * first, alpha=0.15, label="5 % around minute 1")
    axes.set(xlabel="minutes", ylabel="MiB", ylim=(0, None))
    axes.set_title("resident memory of a run with a snapshot every minute")
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--minutes", type=float, default=1.0, help="between snapshots")
    parser.add_argument("--plot", type=Path, help="write a picture; needs matplotlib")
    add_output_arguments(parser, threads=1)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seconds, arguments.minutes = 90.0, 0.1
    return arguments


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        found = run(Path(folder), arguments.seconds, arguments.minutes, arguments.threads)
    samples = found["samples"]
    assert isinstance(samples, list)
    later = [sample for sample in samples if sample["seconds"] >= 60]
    first = later[0]["resident"]
    ratios = [sample["resident"] / first for sample in later]
    print(f"exit code {found['code']}: {found['message']}")
    every_tenth = {f"at {s['seconds']:.0f} s": round(s["resident"], 1) for s in samples[::10]}
    details = {
        "after a minute MiB": first,
        "at the end MiB": later[-1]["resident"],
        "windows": found["windows"],
        "snapshots": found["snapshots"],
        "exit code": found["code"],
    }
    figures = [
        Figure(
            f"largest resident memory over that after a minute, {samples[-1]['seconds']:,.0f} s",
            max(ratios),
            "x",
            LIMIT,
            (min(ratios), max(ratios)),
            details,  # type: ignore[arg-type]
        ),
        Figure("resident memory at the end", later[-1]["resident"], "MiB", None, None, every_tenth),
    ]
    if arguments.plot is not None:
        plot(samples, first, arguments.plot)
        arguments.plot = str(arguments.plot)
    publish("steady_memory", figures, arguments, interval_is="range")


if __name__ == "__main__":
    main()
