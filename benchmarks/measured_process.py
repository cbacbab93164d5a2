"""One measured process of `host_memory.py`: runs one case, prints one line of JSON.

python -m benchmarks.measured_process cell --steps 10000
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, TensorSequence
from tbptt_ckpt.executor import ReplayExecutor
from tbptt_ckpt.memory.resident import RssSampler, rss_bytes

CELL_WIDTH = 16
INPUT_WIDTH, FUSED_WIDTH = 16, 64
SAMPLE_SECONDS = 0.005
WARMUP_STEPS = 2000


def cell_steps(num_steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """A plain generator: each step is made when it is asked for, and has no length ahead."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(num_steps):
        step = torch.randn(1, CELL_WIDTH, generator=generator)
        yield step, step.tanh()


def make_cell(strategy: str, num_steps: int) -> TBPTT:
    torch.manual_seed(0)
    cell = nn.LSTMCell(CELL_WIDTH, CELL_WIDTH)
    optimizer = torch.optim.SGD(cell.parameters(), lr=0.1)
    return TBPTT(cell, nn.functional.mse_loss, num_steps, None, optimizer, strategy=strategy)


def make_fused(strategy: str, offload: Path | None = None) -> TBPTT:
    torch.manual_seed(0)
    lstm = nn.LSTM(INPUT_WIDTH, FUSED_WIDTH)
    optimizer = torch.optim.SGD(lstm.parameters(), lr=0.1)
    # More than any sequence has: one window, one update.
    executor = ReplayExecutor(offload)
    return TBPTT(lstm, symbol_loss, 10**9, None, optimizer, strategy=strategy, executor=executor)


def symbol_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """`outputs` [n, 1, 64] as logits of `targets` [n, 1]."""
    return nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def write_files(folder: Path, num_steps: int, chunk: int = 10_000) -> None:
    """Inputs and targets for `nn.LSTM`, a chunk at a time."""
    generator = np.random.default_rng(0)
    with (folder / "inputs.bin").open("wb") as inputs, (folder / "targets.bin").open("wb") as goals:
        for start in range(0, num_steps, chunk):
            size = min(chunk, num_steps - start)
            generator.standard_normal((size, INPUT_WIDTH), np.float32).tofile(inputs)
            generator.integers(0, FUSED_WIDTH, size, np.int64).tofile(goals)


def mapped(folder: Path, num_steps: int) -> TensorSequence:
    """The first steps of the files, memory-mapped: inputs [T, 1, 16], targets [T, 1]."""
    inputs = np.memmap(folder / "inputs.bin", np.float32, "r", shape=(num_steps, 1, INPUT_WIDTH))
    targets = np.memmap(folder / "targets.bin", np.int64, "r", shape=(num_steps, 1))
    return TensorSequence(inputs, targets)


def measure(tbptt: TBPTT, sequence: object) -> dict[str, float]:
    """Train on the sequence; resident bytes before, at the peak, and after it."""
    before = rss_bytes()
    with RssSampler(SAMPLE_SECONDS) as sampler:
        begun, spent = time.perf_counter(), time.process_time()
        result = tbptt.train(sequence)
        seconds, spent = time.perf_counter() - begun, time.process_time() - spent
    after = rss_bytes()
    return {
        "num_steps": result.num_steps,
        "num_windows": result.num_windows,
        "seconds": seconds,
        "processor_seconds": spent,
        "anonymous_before": before.anonymous,
        "anonymous_peak": sampler.peak_anonymous_bytes,
        "file_backed_before": before.total - before.anonymous,
        "file_backed_after": after.total - after.anonymous,
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=("cell", "fused"))
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--folder", type=Path, help="of the files that `fused` reads")
    parser.add_argument("--offload", type=Path, help="folder for the states of `fused`")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    warmup = min(WARMUP_STEPS, arguments.steps)
    if arguments.case == "cell":
        make_cell(arguments.strategy, warmup).train(cell_steps(warmup))
        figures = measure(
            make_cell(arguments.strategy, arguments.steps), cell_steps(arguments.steps)
        )
    else:
        tbptt = make_fused(arguments.strategy, arguments.offload)
        tbptt.train(mapped(arguments.folder, warmup))
        figures = measure(tbptt, mapped(arguments.folder, arguments.steps))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
