"""What do compiled steps take, for a cell that no kernel runs, and what does compiling them?

An LSTM with a layer norm, windows over all steps (k1 = k2 = T, no optimizer), against plain BPTT
written by hand in eager PyTorch: run everything, then one backward. Steps one by one and by
compiled blocks, in segments of 32 that are recomputed, and blocks with nothing recomputed. The
first window, which compiles, has a cache of its own, is told apart, and counts in no ratio.

    python -m benchmarks.compiled_steps
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.paired import time_pairs
from benchmarks.report import Figure, add_output_arguments, publish
from tbptt_ckpt import TBPTT, TensorSequence

SEGMENT = 32
FORMS: dict[str, dict[str, Any]] = {
    "step by step": {"strategy": f"uniform:{SEGMENT}"},
    "compiled": {"strategy": f"uniform:{SEGMENT}", "compile": True},
    "compiled, nothing recomputed": {"strategy": "retain", "compile": True},
}


class NormedLSTM(nn.Module):
    """One step of an LSTM whose cell is normed before it is read."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inputs, self.state = nn.Linear(width, 4 * width), nn.Linear(width, 4 * width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Any]:
        h, c = state
        i, f, g, o = (self.inputs(x) + self.state(h)).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(self.norm(c))
        return h, (h, c)


@dataclass(frozen=True)
class Size:
    """One row of the table; `limit` is the most time of "compiled", in baselines."""

    lanes: int
    width: int
    limit: float

    def __str__(self) -> str:
        return f"{self.lanes} x {self.width}"


SIZES = (Size(1, 64, 0.35), Size(8, 128, 0.65), Size(8, 256, 0.85))


class Case:
    """A module, the sequence it reads, and the ways to run it."""

    def __init__(self, size: Size, num_steps: int) -> None:
        torch.manual_seed(0)
        self.module = NormedLSTM(size.width)
        self.inputs = torch.randn(num_steps, size.lanes, size.width)
        self.targets = torch.randn(num_steps, size.lanes, size.width)
        zeros = torch.zeros(size.lanes, size.width)
        self.state = zeros, zeros.clone()

    def plain(self) -> float:
        """Plain BPTT by hand."""
        state, total = self.state, torch.zeros(())
        for x, target in zip(self.inputs.unbind(), self.targets.unbind(), strict=True):
            output, state = self.module(x, state)
            total = total + nn.functional.mse_loss(output, target)
        loss = total / len(self.inputs)
        loss.backward()
        return float(loss.detach())

    def treated(self, form: str) -> tuple[Callable[[], float], float]:
        """The package, once what is made once is made; the seconds that compiling took."""
        num_steps = len(self.inputs)
        tbptt = TBPTT(self.module, nn.functional.mse_loss, num_steps, None, **FORMS[form])
        data = TensorSequence(self.inputs, self.targets)

        def run() -> float:
            loss = tbptt.train(data, self.state).loss
            assert loss is not None, "every step has a target"
            return loss

        (window,) = tbptt.windows(data, self.state)
        run()
        return run, window.compile_seconds


def figures_of(size: Size, num_steps: int, pairs: int) -> list[Figure]:
    """What the forms take at a size."""
    case, figures = Case(size, num_steps), []
    for form in FORMS:
        run, seconds = case.treated(form)
        times = time_pairs(case.plain, run, pairs)
        further = {**times.seconds(), "compiling s": seconds}
        limit = size.limit if form == "compiled" else None
        what = f"{size}, {form}: time"
        figures.append(Figure(what, times.ratio, "x", limit, times.interval, further))
        print(figures[-1].line(), flush=True)
    return figures


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--steps", type=int, default=512)
    parser.add_argument("--only", default="", help="sizes whose name contains this")
    parser.add_argument("--cache", default="", help="folder of an earlier run's compiled code")
    add_output_arguments(parser)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    sizes = [size for size in SIZES if arguments.only in str(size)]
    if arguments.quick:
        arguments.pairs, arguments.steps, sizes = 2, 2 * SEGMENT, [Size(2, 8, 9.0)]
    with tempfile.TemporaryDirectory() as fresh:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = arguments.cache or fresh
        figures = [
            figure
            for size in sizes
            for figure in figures_of(size, arguments.steps, arguments.pairs)
        ]
    publish("compiled_steps", figures, arguments)


if __name__ == "__main__":
    main()
