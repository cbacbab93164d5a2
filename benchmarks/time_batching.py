"""Is recomputing with products over time faster than plain BPTT, in a twentieth of its memory?

Windows over all steps (k1 = k2 = T, no optimizer) with time batching, against plain BPTT
written by hand in eager PyTorch: run everything, then one backward. Once in segments that
are recomputed, once with nothing recomputed, and with `--budget` by the plan and in the form that
are the fastest within a share of plain BPTT's peak. "LSTMCell" and others are steps of a cell and a
readout that are written as one forward, "Recurrent" the same in parts.

Gradients are cleared before each run, as training does. Peaks are tensor-allocator bytes above
weights, inputs and gradients.

    python -m benchmarks.time_batching
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.paired import time_pairs
from benchmarks.recomputation import gradients_of, peak_bytes_of
from benchmarks.report import Figure, add_output_arguments, publish
from tbptt_ckpt import TBPTT, Recurrent, TensorSequence

NUM_BYTES = 64
MOST_PEAK_PERCENT = 5.0
ROWS = ("segments", "kept", "budget", "unbatched")  # "budget" with `--budget` alone


class DeepTransition(nn.Module):
    """A state that passes two layers from step to step (Pascanu et al., arXiv:1312.6026)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inputs, self.state = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.transition = nn.Linear(width, width)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.transition(torch.tanh(self.inputs(x) + self.state(h))))


def make_step(cell: str, width: int) -> nn.Module:
    """A cell and a readout, as one forward or in parts."""
    if cell.startswith(IN_PARTS):
        transition = CELLS[cell.removeprefix(IN_PARTS)](width, width)
        return Recurrent(transition, readout=nn.Linear(width, NUM_BYTES))
    return Step(cell, width)


class Step(nn.Module):
    """One step: a cell, and a readout of its first state."""

    def __init__(self, cell: str, width: int) -> None:
        super().__init__()
        self.cell = DeepTransition(width) if cell == "deep" else CELLS[cell](width, width)
        self.readout = nn.Linear(width, NUM_BYTES)

    def forward(self, x: Tensor, state: object) -> tuple[Tensor, object]:
        state = self.cell(x, state)
        return self.readout(state[0] if isinstance(state, tuple) else state), state


IN_PARTS = "Recurrent "
CELLS = {"LSTMCell": nn.LSTMCell, "GRUCell": nn.GRUCell, "RNNCell": nn.RNNCell}


@dataclass(frozen=True)
class Size:
    """One row of the table.

    Attributes:
        cell: A name of `CELLS`, or "deep"; "Recurrent" before it for a step in three parts.
        segment: Steps recomputed as one piece.
        limit: Most time with recomputation, in baselines.
        limit_kept: The same with nothing recomputed.
    """

    cell: str
    lanes: int
    width: int
    num_steps: int
    segment: int
    limit: float
    limit_kept: float

    def __str__(self) -> str:
        return f"{self.cell} {self.lanes} x {self.width}, {self.num_steps} steps"


SIZES = (
    Size("LSTMCell", 4, 64, 1000, 32, 0.25, 0.25),
    Size("LSTMCell", 8, 512, 1000, 32, 0.35, 0.35),
    Size("LSTMCell", 16, 1024, 400, 16, 0.85, 0.60),
    Size("LSTMCell", 32, 256, 1000, 24, 0.55, 0.55),
    Size("GRUCell", 8, 512, 1000, 32, 0.90, 0.75),
    Size("Recurrent LSTMCell", 32, 256, 1000, 24, 0.55, 0.55),
    Size("Recurrent LSTMCell", 8, 512, 1000, 32, 0.35, 0.35),
    Size("Recurrent LSTMCell", 4, 64, 1000, 32, 0.25, 0.25),
    Size("Recurrent GRUCell", 8, 512, 1000, 32, 0.63, 0.63),
    Size("deep", 8, 512, 1000, 32, 0.90, 0.75),
)


class Case:
    """A module, the sequence it reads, and both ways to run it."""

    def __init__(self, size: Size) -> None:
        torch.manual_seed(0)
        self.module = make_step(size.cell, size.width)
        self.inputs = torch.randn(size.num_steps, size.lanes, size.width)
        self.targets = torch.randint(0, NUM_BYTES, self.inputs.shape[:2])
        zeros = torch.zeros(size.lanes, size.width)
        self.state = (zeros, zeros.clone()) if "LSTMCell" in size.cell else zeros

    def plain(self) -> float:
        """Plain BPTT by hand."""
        self.module.zero_grad()
        state, total = self.state, torch.zeros(())
        for x, target in zip(self.inputs.unbind(), self.targets.unbind(), strict=True):
            logits, state = self.module(x, state)
            total = total + nn.functional.cross_entropy(logits, target)
        loss = total / len(self.inputs)
        loss.backward()
        return float(loss.detach())

    @property
    def given_bytes(self) -> int:
        """What exists before a window: weights, their gradients, inputs and targets."""
        weights = sum(parameter.nbytes for parameter in self.module.parameters())
        return 2 * weights + self.inputs.nbytes + self.targets.nbytes

    def treated(
        self, strategy: str, time_batching: object, memory_budget: int | None = None
    ) -> Callable[[], float]:
        """The package, as a run of many windows: what is made once is made before."""
        num_steps = len(self.inputs)
        tbptt = TBPTT(
            self.module,
            nn.functional.cross_entropy,
            num_steps,
            num_steps,
            strategy=strategy,
            time_batching=time_batching,
            memory_budget=memory_budget,
        )

        def run() -> float:
            self.module.zero_grad()
            loss = tbptt.train(TensorSequence(self.inputs, self.targets), self.state).loss
            assert loss is not None, "every step has a target"
            return loss

        return run


def compare(
    what: str,
    case: Case,
    treated: Callable[[], float],
    limits: tuple[float | None, float | None],
    num_pairs: int,
) -> list[Figure]:
    """Time and peak of the package over those of plain BPTT."""
    expected, found = gradients_of(case, case.plain), gradients_of(case, treated)  # type: ignore[arg-type]
    error = float((found - expected).norm() / expected.norm())
    if error > 1e-5:
        raise SystemExit(f"{what}: gradients differ by {error:.1e}, so times mean nothing")
    times = time_pairs(case.plain, treated, num_pairs, num_warmups=4)  # budgets meter the first
    plain_bytes, treated_bytes = peak_bytes_of(case.plain), peak_bytes_of(treated)
    further = {**times.seconds(), "gradient error": error}
    sizes = {"baseline MiB": plain_bytes / 2**20, "treated MiB": treated_bytes / 2**20}
    figures = [
        Figure(f"{what}: time", times.ratio, "x", limits[0], times.interval, further),
        Figure(f"{what}: peak", 100 * treated_bytes / plain_bytes, "%", limits[1], None, sizes),
    ]
    for figure in figures:
        print(figure.line(), flush=True)
    return figures


def figures_of(size: Size, arguments: argparse.Namespace) -> list[Figure]:
    """The rows of one size that are asked for."""
    case, figures = Case(size), list[Figure]()
    form = True if arguments.form == "batched" else arguments.form
    segments = f"uniform:{arguments.segment or size.segment}"
    limits = size.limit, MOST_PEAK_PERCENT
    ways: dict[str, tuple[str, Callable[[], float], tuple[float | None, float | None]]] = {}
    ways["segments"] = segments, case.treated(segments, form), limits
    ways["kept"] = "retain", case.treated("retain", form), (size.limit_kept, None)
    ways["unbatched"] = f"{segments}, unbatched", case.treated(segments, False), (None, None)
    if arguments.budget:
        budget = case.given_bytes + int(arguments.budget / 100 * peak_bytes_of(case.plain))
        within = case.treated("optimal", form, memory_budget=budget)
        ways["budget"] = (
            f"within {arguments.budget:g} %",
            within,
            (size.limit, arguments.budget),
        )
    for row in arguments.rows:
        if row in ways:
            what, treated, most = ways[row]
            figures += compare(f"{size}, {what}", case, treated, most, arguments.pairs)
    return figures


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--only", default="", help="sizes whose name contains this")
    parser.add_argument("--segment", type=int, help="steps recomputed as one piece")
    parser.add_argument("--form", default="auto", choices=("auto", "fused", "mixed", "batched"))
    parser.add_argument("--budget", type=float, help="percent of plain BPTT's peak: also within it")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS[:3], help="of a size")
    add_output_arguments(parser)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    sizes = [size for size in SIZES if arguments.only in str(size)]
    if arguments.quick:
        arguments.pairs = 2
        cells = (*CELLS, "deep", *(IN_PARTS + cell for cell in CELLS))
        sizes = [Size(cell, 2, 16, 40, 8, 9.0, 9.0) for cell in cells]
    figures = [figure for size in sizes for figure in figures_of(size, arguments)]
    publish("time_batching", figures, arguments)


if __name__ == "__main__":
    main()
