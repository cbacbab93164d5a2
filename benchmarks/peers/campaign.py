"""Runs entries in fresh processes, interleaved, and remembers what is done.

Every measurement is a process of its own and a line in a file, so that a run which was cut
off, or which should not hold a machine for long, goes on where it stopped.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.entries import BASELINE, Entry, entry_of
from benchmarks.peers.work import Size

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Job:
    """One process to be measured.

    Attributes:
        entry: Key of what runs.
        size: The work.
        what: "peak", or "time" (and gradients).
        number: Round, for "time".
    """

    entry: str
    size: Size
    what: str
    number: int = 0


class Records:
    """What was measured so far: one line of JSON for each job, in a file."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._file = folder / "records.jsonl"
        self.results: dict[Job, dict[str, Any]] = {}
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        for line in lines:
            record = json.loads(line)
            size = Size(**record["job"].pop("size"))
            self.results[Job(size=size, **record["job"])] = record["result"]

    def add(self, job: Job, result: dict[str, Any]) -> None:
        self.results[job] = result
        with self._file.open("a") as file:
            file.write(json.dumps({"job": asdict(job), "result": result}) + "\n")

    def has_failed(self, job: Job) -> bool:
        """Whether that entry has failed at that size."""
        return any(
            "error" in result and (done.entry, done.size) == (job.entry, job.size)
            for done, result in self.results.items()
        )

    def peak_bytes(self, entry: str, size: Size) -> int | None:
        """The peak of an entry, if it was measured."""
        return self.results.get(Job(entry, size, "peak"), {}).get("peak_bytes")

    def save(self, name: str, results: list[dict[str, Any]]) -> None:
        """Keep further results under a name."""
        (self.folder / f"{name}.json").write_text(json.dumps(results))

    def load(self, name: str) -> list[dict[str, Any]]:
        """What was kept under a name; empty if nothing."""
        file = self.folder / f"{name}.json"
        return json.loads(file.read_text()) if file.exists() else []

    def reference(self, size: Size) -> Path:
        """Where the baseline's gradients are."""
        return self.folder / f"gradient-{size.width}-{size.num_lanes}-{size.num_steps}.npz"


class Clock:
    """Says when it is too late to start anything."""

    def __init__(self, minutes: float | None) -> None:
        self._end = None if minutes is None else time.perf_counter() + 60 * minutes

    @property
    def is_over(self) -> bool:
        return self._end is not None and time.perf_counter() > self._end


def peaks(entries: Sequence[Entry], sizes: Sequence[Size]) -> Iterator[Job]:
    """Peaks do not vary: once each, those first that are budgets of others."""
    for size in sizes:
        for entry in sorted(entries, key=lambda entry: entry.level_of is not None):
            yield Job(entry.key, size, "peak")


def rounds(entries: Sequence[Entry], sizes: Sequence[Size], num_rounds: int) -> Iterator[Job]:
    """All entries in turn, then all again, backwards: a slow stretch hits neighbours alike.

    The baseline is the first to run: its gradient is what the others are held against.
    """
    order = sorted(entries, key=lambda entry: entry != BASELINE)
    for size in sizes:
        for number in range(num_rounds):
            for entry in order if number % 2 == 0 else reversed(order):
                yield Job(entry.key, size, "time", number)


def run(
    jobs: Iterable[Job],
    records: Records,
    *,
    num_runs: int,
    threads: int,
    clock: Clock,
    most_seconds: float,
) -> bool:
    """Do the jobs that are not done yet; False where the time ran out before the last.

    One that takes more than `most_seconds` is stopped, and has failed. Who has failed at a size is
    not run there again.
    """
    for job in jobs:
        if job in records.results or records.has_failed(job):
            continue
        if clock.is_over:
            return False
        level_of = entry_of(job.entry).level_of
        budget = records.peak_bytes(level_of, job.size) if level_of else None
        if level_of and budget is None:
            print(f"{job.size}: {job.entry}: left out, the peak of {level_of} is not known")
            continue
        command = _command(job, budget, records.reference(job.size), num_runs, threads)
        result = _measured(command, most_seconds)
        records.add(job, result)
        print(f"{job.size}: {job.entry}: {_brief(result)}", flush=True)
    return True


def _command(
    job: Job, budget: int | None, reference: Path, num_runs: int, threads: int
) -> list[str]:
    size = job.size
    command = [sys.executable, "-m", "benchmarks.peers.measured_peer", job.entry]
    command += ["--width", str(size.width), "--lanes", str(size.num_lanes)]
    command += ["--steps", str(size.num_steps), "--runs", str(num_runs)]
    command += ["--budget-bytes", str(budget)] if budget is not None else []
    command += ["--what", job.what]
    return [*command, "--reference", str(reference), "--threads", str(threads)]


def _measured(command: Sequence[str], most_seconds: float) -> dict[str, Any]:
    """What a fresh process reports; a peer that fails says why, and the others go on."""
    try:
        done = subprocess.run(
            command,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=False,
            timeout=most_seconds,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"stopped after {most_seconds:g} s"}
    if done.returncode != 0:
        return {"error": (done.stderr.strip().splitlines() or ["killed"])[-1]}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _brief(result: dict[str, Any]) -> str:
    if "error" in result:
        return f"FAILED: {result['error']}"
    if "peak_bytes" in result:
        return f"{result['peak_bytes'] / 2**20:.2f} MiB"
    seconds = " ".join(f"{seconds:.3f} s" for seconds in result["seconds"])
    return f"{seconds}, error {result['gradient_error']:.0e}"
