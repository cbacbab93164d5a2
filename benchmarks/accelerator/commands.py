"""The commands as users type them, each in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.accelerator.bench import Bench, mib
from benchmarks.accelerator.check import Check, promised
from benchmarks.accelerator.memory import is_near

TREE = Path(__file__).resolve().parents[2]
LARGE = ["--hidden", "512", "--lanes", "64"]
SMALL = ["--hidden", "16", "--lanes", "4"]
SHOWN = ("peak_bytes", "predicted_peak_bytes", "reserved_peak_bytes", "fixed_bytes")


def commands(bench: Bench) -> Iterator[Check]:
    """`profile`, `plan` and `train`."""
    sizes = SMALL if bench.is_quick else LARGE
    yield from _profile(bench, sizes)
    plan = ["plan", "--device", bench.device.type, *sizes, "--steps", "100"]
    yield _outcome("plan", *_run(bench, plan))
    steps = ["--max-steps", "256" if bench.is_quick else "6400"]
    yield _outcome("train", *_run(bench, ["train", "--device", bench.device.type, *sizes, *steps]))
    yield _outcome("doctor", *_run(bench, ["doctor"]))


def _profile(bench: Bench, sizes: list[str]) -> Iterator[Check]:
    reach = ["--k1", "16", "--k2", "64"] if bench.is_quick else ["--k1", "128", "--k2", "512"]
    with tempfile.TemporaryDirectory() as folder:
        command = ["profile", "--device", bench.device.type, *sizes, *reach, "--repeats", "2"]
        command += ["--json", "--strategy", "uniform:32,sqrt", "--trace", f"{folder}/trace.json"]
        if bench.is_cuda:
            command += ["--memory-history", f"{folder}/history.pickle"]
        code, out, seconds = _run(bench, command)
        written = sorted(path.name for path in Path(folder).iterdir())
    yield _outcome("profile", code, out, seconds, written=written)
    if code:
        return
    rows = json.loads(out[out.index("{") :])["rows"]
    for row in rows:
        figures = {name.replace("bytes", "mib"): mib(row[name]) for name in SHOWN}
        is_kept = row["status"] == "ok" and is_near(row["predicted_peak_bytes"], row["peak_bytes"])
        error = row["prediction_error"]
        yield promised(is_kept, f"profile, row {row['strategy']}", error=error, **figures)
    if bench.is_accelerator:
        reserved = {row["strategy"]: row["reserved_peak_bytes"] for row in rows}
        is_told = bench.is_quick or reserved["uniform:32"] < 0.6 * reserved["retain"]
        shown = {name: mib(num_bytes) for name, num_bytes in reserved.items()}
        yield promised(is_told, "reserved bytes tell strategies apart", **shown)


def _outcome(what: str, code: int, out: str, seconds: float, **figures: Any) -> Check:
    lines = out.strip().splitlines() or [""]
    said = {} if code == 0 else {"code": code, "said": lines[-1][-160:]}
    is_flat = "not part of single contiguous" not in out  # what cuDNN says of scattered weights
    return promised(code == 0 and is_flat, what, seconds=seconds, **said, **figures)


def _run(bench: Bench, arguments: list[str]) -> tuple[int, str, float]:
    """Exit code, all that was printed, and seconds; from this tree, installed or not."""
    path = os.pathsep.join(filter(None, [str(TREE), os.environ.get("PYTHONPATH", "")]))
    begun, limit = time.perf_counter(), max(30.0, min(150.0, bench.seconds_left))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "tbptt_ckpt", *arguments],
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
            env={**os.environ, "PYTHONPATH": path},
        )
    except subprocess.TimeoutExpired:
        return 124, f"no end after {limit:.0f} s", limit
    out = done.stdout if done.returncode == 0 else done.stdout + done.stderr
    return done.returncode, out, time.perf_counter() - begun
