"""Does `k2="auto"` end where the best fixed k2 of a sweep ends, on streams of any reach?

Two streams: the bytes of Python's library, and a signal in a memory-mapped file that must be told
from its noise to be predicted (a slow random walk that fades, seen through noise as large as half
of it). Loss on steps that were not trained on, and CPU seconds, audits included.

    python -m benchmarks.auto_k2_streams
"""

from __future__ import annotations

import argparse
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.report import Figure, add_output_arguments, publish
from tbptt_ckpt import TBPTT, ArraySequence
from tbptt_ckpt.data import map_file

K1, MAX_K2, LANES, HELD_OUT = 8, 128, 16, 2_000
FADES = 0.975  # of the signal, a step


class Predictor(nn.Module):
    """An embedding of numbers or bytes, an LSTM over a segment, and a readout."""

    def __init__(self, embedding: nn.Module, width: int, outputs: int) -> None:
        super().__init__()
        self.embedding, self.lstm = embedding, nn.LSTM(width, width)
        self.readout = nn.Linear(width, outputs)

    def forward(self, inputs: Tensor, state: object) -> tuple[Tensor, object]:
        """Inputs [T, B] or [T, B, 1] to outputs [T, B, outputs]."""
        hidden, state = self.lstm(self.embedding(inputs), state)
        return self.readout(hidden), state


def byte_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())


@dataclass(frozen=True)
class Task:
    """What is learned: the model for a width, the loss, and the unit in which it is shown."""

    make: Callable[[int], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    write: Callable[[Path, int], None]
    unit: str
    scale: float
    options: dict[str, Any]


def write_bytes(path: Path, num_steps: int) -> None:
    """Lanes of `num_steps + 1` bytes each, [T, B], from the library's files in order."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = b"".join(file.read_bytes() for file in files)
    lanes = np.frombuffer(text[: (num_steps + 1) * LANES], dtype=np.uint8)
    np.save(path, lanes.reshape(LANES, -1).T)


def write_signal(path: Path, num_steps: int) -> None:
    """A signal of variance 1 in each lane, [T, B, 1], and noise of half that deviation."""
    random = np.random.default_rng(0)
    pushes = random.standard_normal((num_steps + 1, LANES)) * np.sqrt(1 - FADES**2)
    signal = np.empty_like(pushes)
    signal[0] = random.standard_normal(LANES)
    for step in range(1, len(signal)):
        signal[step] = FADES * signal[step - 1] + pushes[step]
    seen = signal + 0.5 * random.standard_normal(signal.shape)
    np.save(path, seen[..., None].astype(np.float32))


TASKS = {
    "bytes": Task(
        lambda width: Predictor(nn.Embedding(256, width), width, 256),
        *(byte_loss, write_bytes, "bits per byte", 1 / float(np.log(2))),
        {"dtype": torch.int64},
    ),
    "signal": Task(
        lambda width: Predictor(nn.Linear(1, width), width, 1),
        *(nn.functional.mse_loss, write_signal, "squared error", 1.0),
        {},
    ),
}


@dataclass(frozen=True)
class Outcome:
    """One run: its loss on steps of its own, and what it took."""

    loss: float
    cpu_seconds: float
    mean_reach: float


def run(task: Task, path: Path, k2: Any, given: argparse.Namespace, seed: int) -> Outcome:
    rows = map_file(path)
    seen = ArraySequence(rows[: given.steps + 1], next_step=True, **task.options)
    unseen = ArraySequence(rows[given.steps :], next_step=True, **task.options)
    torch.manual_seed(seed)
    model = task.make(given.width)
    optimizer = torch.optim.Adam(model.parameters(), lr=given.lr)
    most = {"max_k2": MAX_K2} if k2 == "auto" else {}
    tbptt = TBPTT(
        *(model, task.loss, K1, k2, optimizer),
        **{"per_step": False, "clip_grad_norm": 1.0, "strategy": "retain", **most},
    )
    begun = time.process_time()
    reached = [window.stop - window.start for window in tbptt.windows(seen)]
    seconds = time.process_time() - begun
    loss = tbptt.evaluate(unseen).loss
    return Outcome(float(loss) * task.scale, seconds, sum(reached) / len(reached))


def figures_of(name: str, given: argparse.Namespace) -> list[Figure]:
    task, figures = TASKS[name], []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.npy"
        task.write(path, given.steps + (50 if given.quick else HELD_OUT))
        for text in given.k2:
            k2 = text if text == "auto" else int(text)
            runs = [run(task, path, k2, given, seed) for seed in range(given.seeds)]
            losses = sorted(outcome.loss for outcome in runs)
            figure = Figure(
                what=f"{name}, k2 = {text}",
                measured=statistics.fmean(losses),
                unit=task.unit,
                interval=(losses[0], losses[-1]),
                details={
                    "CPU seconds": statistics.fmean(o.cpu_seconds for o in runs),
                    "mean reach": statistics.fmean(o.mean_reach for o in runs),
                },
            )
            figures.append(figure)
            print(figure.line(), flush=True)
    return figures


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=16_000, help="time steps per lane")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each setting")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--k2", nargs="+", default=["auto", "8", "16", "32", "64", "128"])
    add_output_arguments(parser, threads=1)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps, arguments.seeds, arguments.k2 = 400, 1, ["auto", "8"]
    return arguments


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    figures = [figure for name in arguments.tasks for figure in figures_of(name, arguments)]
    publish("auto_k2_streams", figures, arguments, interval_is="least and most over the seeds")


if __name__ == "__main__":
    main()
