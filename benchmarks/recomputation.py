"""What does recomputing cost in time, and what does it save in memory?

One window over T = 1000 steps (k1 = k2 = T, no optimizer) with segments of 32 steps, against
plain BPTT written by hand: run everything, then one backward. Gradients are cleared before each
run, as training does. Peaks are tensor-allocator bytes above weights, inputs and gradients.

Each row is measured in a process of its own: where a row before it made the heap large, plain
BPTT faults in fewer pages, and its ratio is 0.05 to 0.1 higher.

The cell is a plain step, whose parts windows find by themselves; with `time_batching=False` it is
called step by step. Segment modules ask `outputs_needed`, so that an advance makes no readout. What
it costs not to ask is shown for bytes and for a large vocabulary.

    python -m benchmarks.recomputation
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.paired import time_pairs
from benchmarks.report import Figure, add_output_arguments, publish
from tbptt_ckpt import TBPTT, TensorSequence
from tbptt_ckpt.memory.meter import peak_memory
from tbptt_ckpt.module import outputs_needed

NUM_BYTES = 256


@dataclass(frozen=True)
class Limits:
    """Most time, in baselines, and most memory, in percent of the baseline's."""

    time: float
    peak_percent: float


LIMITS_CELL, LIMITS_FUSED = Limits(1.40, 7.0), Limits(1.10, 5.0)


class ByteCell(nn.Module):
    """One step: an LSTM cell and a readout over bytes."""

    def __init__(self, width: int, num_symbols: int = NUM_BYTES) -> None:
        super().__init__()
        self.cell, self.readout = nn.LSTMCell(width, width), nn.Linear(width, num_symbols)

    def forward(self, x: Tensor, state: object) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h, c = self.cell(x, state)
        return self.readout(h), (h, c)


class ByteLSTM(nn.Module):
    """A segment: `nn.LSTM` and a readout over bytes, or over more symbols."""

    def __init__(self, width: int, num_symbols: int = NUM_BYTES) -> None:
        super().__init__()
        self.lstm, self.readout = nn.LSTM(width, width), nn.Linear(width, num_symbols)

    def forward(self, x: Tensor, state: object) -> tuple[Tensor | None, object]:
        h, state = self.lstm(x, state)
        return self.readout(h) if outputs_needed() else None, state


class UnaskingLSTM(ByteLSTM):
    """The same, with readouts in advances too."""

    def forward(self, x: Tensor, state: object) -> tuple[Tensor, object]:
        h, state = self.lstm(x, state)
        return self.readout(h), state


@dataclass(frozen=True)
class Case:
    """A module, the sequence it reads, and both ways to run it."""

    module: nn.Module
    inputs: Tensor  # [T, B, F]
    targets: Tensor  # [T, B]
    segment: int

    @property
    def per_step(self) -> bool:
        return isinstance(self.module, ByteCell)

    def plain(self) -> float:
        """Plain BPTT by hand."""
        self.module.zero_grad()
        loss = self._loss_of_steps() if self.per_step else self._loss_of_sequence()
        loss.backward()
        return float(loss.detach())

    def _loss_of_steps(self) -> Tensor:
        state, total = None, torch.zeros(())
        for x, target in zip(self.inputs.unbind(), self.targets.unbind(), strict=True):
            logits, state = self.module(x, state)
            total = total + nn.functional.cross_entropy(logits, target)
        return total / len(self.inputs)

    def _loss_of_sequence(self) -> Tensor:
        logits, _ = self.module(self.inputs, None)
        return byte_loss(logits, self.targets)

    def recomputed(
        self, executor: str, time_batching: object = "auto", **options: Any
    ) -> Callable[[], float]:
        """The package, recomputing segments, as in a run of many windows."""
        num_steps = len(self.inputs)
        tbptt = TBPTT(
            self.module,
            byte_loss,
            num_steps,
            num_steps,
            strategy=f"uniform:{self.segment}",
            executor=executor,
            time_batching=time_batching,
            per_step=self.per_step,
            **options,
        )

        def run() -> float:
            self.module.zero_grad()
            loss = tbptt.train(TensorSequence(self.inputs, self.targets)).loss
            assert loss is not None, "every step has a target"
            return loss

        return run


def byte_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.flatten())


def gradients_of(case: Case, run: Callable[[], float]) -> Tensor:
    """The gradient that a run makes, flat; leaves the weights' `.grad` in place."""
    run()
    return torch.cat([p.grad.flatten().clone() for p in case.module.parameters()])


def peak_bytes_of(run: Callable[[], float]) -> int:
    """Most tensor bytes above those at the start, in the second of two runs.

    A run that clears gradients has those of the one before at its start.
    """
    run()
    with peak_memory(rss=False) as memory:
        run()
    return memory.peak_bytes


@dataclass(frozen=True)
class Row:
    """One comparison of the table."""

    what: str
    make_module: Callable[[int, int], nn.Module]  # of its width and number of symbols
    limits: Limits | None = None
    executor: str = "replay"
    time_batching: object = "auto"
    large: bool = False  # a large vocabulary, fewer steps, lanes and steps of a segment

    def case(self, arguments: argparse.Namespace) -> Case:
        """The case at the sizes that were asked for."""
        steps, lanes, segment = arguments.steps, arguments.lanes, arguments.segment
        num_symbols = NUM_BYTES
        if self.large:
            steps, lanes, segment = steps // 4, lanes // 2, segment // 2
            num_symbols = arguments.symbols
        torch.manual_seed(0)
        return Case(
            self.make_module(arguments.width, num_symbols),
            torch.randn(steps, lanes, arguments.width),
            torch.randint(0, num_symbols, (steps, lanes)),
            segment,
        )


ROWS = (
    Row("LSTMCell step, replay", ByteCell, LIMITS_CELL),
    Row("LSTMCell loop, replay", ByteCell, time_batching=False),
    Row("nn.LSTM per segment, replay", ByteLSTM, LIMITS_FUSED),
    Row("LSTMCell loop, checkpoint", ByteCell, executor="checkpoint"),
    Row("nn.LSTM per segment, checkpoint", ByteLSTM, executor="checkpoint"),
    Row("nn.LSTM, readouts in advances too", UnaskingLSTM),
    Row("nn.LSTM, large vocabulary", ByteLSTM, large=True),
    Row("nn.LSTM, large vocabulary, readouts in advances too", UnaskingLSTM, large=True),
)


def compare(row: Row, arguments: argparse.Namespace) -> list[Figure]:
    """Time and peak of the package over those of plain BPTT."""
    torch.set_num_threads(arguments.threads)
    case, limits = row.case(arguments), row.limits
    treated = case.recomputed(row.executor, row.time_batching)
    expected, found = gradients_of(case, case.plain), gradients_of(case, treated)
    error = float((found - expected).norm() / expected.norm())
    if error > 1e-4:
        raise SystemExit(f"{row.what}: gradients differ by {error:.1e}, so times mean nothing")
    times = time_pairs(case.plain, treated, num_pairs=arguments.pairs)
    plain_bytes, treated_bytes = peak_bytes_of(case.plain), peak_bytes_of(treated)
    return [
        Figure(
            f"{row.what}: time",
            times.ratio,
            "x",
            limits and limits.time,
            times.interval,
            {**times.seconds(), "gradient error": error},
        ),
        Figure(
            f"{row.what}: peak",
            100 * treated_bytes / plain_bytes,
            "%",
            limits and limits.peak_percent,
            None,
            {"baseline MiB": plain_bytes / 2**20, "treated MiB": treated_bytes / 2**20},
        ),
    ]


def compare_in_a_process(row: Row, arguments: argparse.Namespace) -> list[Figure]:
    """The same, by a process that does nothing else."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(compare, row, arguments).result()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--lanes", type=int, default=32)
    parser.add_argument("--width", type=int, default=256, help="of inputs and state")
    parser.add_argument("--segment", type=int, default=32, help="steps recomputed as one piece")
    parser.add_argument("--symbols", type=int, default=10_000, help="of the large vocabulary")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    add_output_arguments(parser)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps, arguments.lanes, arguments.width = 64, 2, 16
        arguments.segment, arguments.pairs, arguments.symbols = 8, 4, 300
    return arguments


def main() -> None:
    arguments = parse_arguments()
    figures = []
    for row in (each for each in ROWS if arguments.only in each.what):
        found = compare_in_a_process(row, arguments)
        print(*(figure.line() for figure in found), sep="\n", flush=True)
        figures += found
    torch.set_num_threads(arguments.threads)  # as in the processes, for the report
    publish("recomputation", figures, arguments)


if __name__ == "__main__":
    main()
