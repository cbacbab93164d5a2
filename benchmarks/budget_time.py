"""What does a memory budget cost in time, and does "auto" find the fastest way?

    python -m benchmarks.budget_time --part budgets
    python -m benchmarks.budget_time --part auto

`budgets` holds training under a budget against plain BPTT by hand. The budget is what both
hold anyway (weights, gradients, inputs) and a share of the peak of plain BPTT above that.
`auto` gives no budget and holds the plan it finds against retaining everything and against
leaves of fixed lengths, on two modules where retaining is fast and on one whose graph does not
fit into caches. The first three runs of each way measure and correct its plan and are not timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.paired import time_pairs
from benchmarks.recomputation import NUM_BYTES, ByteCell, ByteLSTM, Case, byte_loss, peak_bytes_of
from benchmarks.report import Figure, add_output_arguments, publish
from tbptt_ckpt import TBPTT, TensorSequence
from tbptt_ckpt.memory.storages import tensor_bytes

SHARES = {"nn.LSTM": {0.05: 1.08}, "LSTMCell loop": {0.05: 1.40, 0.02: 1.50}}
FIXED = ("retain", "uniform:16", "uniform:32", "uniform:64", "uniform:128")


class Elementwise(nn.Module):
    """A wide gated unit without products: its time is that of reading and writing memory."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate, self.decay = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        h = torch.zeros_like(x) if h is None else h
        z = torch.sigmoid(x * self.gate + h * self.decay)
        h = z * h + (1 - z) * torch.tanh(x + h * z)
        return h, h


@dataclass
class Engine:
    """A way of training on one window, with its plan."""

    case: Case
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    options: dict[str, object]

    def __post_init__(self) -> None:
        steps = len(self.case.inputs)
        per_step = not isinstance(self.case.module, ByteLSTM)
        self.tbptt = TBPTT(
            self.case.module, self.loss_fn, steps, steps, per_step=per_step, **self.options
        )
        self.sequence = TensorSequence(self.case.inputs, self.case.targets)

    def run(self) -> float:
        """One window."""
        self.case.module.zero_grad()
        (window,) = self.tbptt.windows(self.sequence)
        self.plan = window.plan
        return float(window.loss)  # type: ignore[arg-type]


def budget_figures(
    case: Case, name: str, pairs: int, scale: int, shares: list[float] | None
) -> list[Figure]:
    """Time under budgets over plain BPTT."""
    held = 2 * tensor_bytes(case.module) + tensor_bytes(case.inputs, case.targets)
    plain_peak = peak_bytes_of(case.plain)
    figures = []
    for share, limit in SHARES[name].items():
        if shares and share not in shares:
            continue
        budget = int(held + scale * share * plain_peak)
        engine = Engine(case, byte_loss, {"memory_budget": budget})
        times = time_pairs(case.plain, engine.run, num_pairs=pairs, num_warmups=4)
        peak = peak_bytes_of(engine.run)
        figures.append(
            Figure(
                f"{name}, {100 * share:g} % of plain peak: time",
                times.ratio,
                "x",
                limit,
                times.interval,
                {
                    **times.seconds(),
                    "peak %": 100 * peak / plain_peak,
                    "longest leaf": engine.plan.longest_leaf,
                    "states": engine.plan.num_boundaries,
                    "executed per step": engine.plan.executed_steps / len(case.inputs),
                },
            )
        )
        print(figures[-1].line(), flush=True)
    return figures


def auto_figures(
    case: Case, name: str, loss_fn: Callable[[Tensor, Tensor], Tensor], pairs: int
) -> list[Figure]:
    """Time of "auto" over that of each fixed strategy."""
    auto = Engine(case, loss_fn, {"strategy": "auto"})
    for _ in range(3):
        auto.run()
    figures = []
    for strategy in FIXED:
        fixed = Engine(case, loss_fn, {"strategy": strategy})
        times = time_pairs(fixed.run, auto.run, num_pairs=pairs, num_warmups=1)
        figures.append(
            Figure(
                f"{name}: auto over {strategy}",
                times.ratio,
                "x",
                1.02,
                times.interval,
                {**times.seconds(), "longest leaf": auto.plan.longest_leaf},
            )
        )
        print(figures[-1].line(), flush=True)
    return figures


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=["budgets", "auto"], default="budgets")
    parser.add_argument("--modules", nargs="+", default=["LSTMCell loop", "nn.LSTM", "elementwise"])
    parser.add_argument("--shares", type=float, nargs="+", help="of plain peak; all by default")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--lanes", type=int, default=32)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=15)
    add_output_arguments(parser)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps, arguments.lanes, arguments.width, arguments.pairs = 64, 2, 16, 2
    return arguments


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    inputs = torch.randn(arguments.steps, arguments.lanes, arguments.width)
    targets = torch.randint(0, NUM_BYTES, inputs.shape[:2])
    figures: list[Figure] = []
    for name in arguments.modules:
        if name == "elementwise":
            if arguments.part == "auto":
                wide = torch.randn(arguments.steps // 5, arguments.lanes, 16 * arguments.width)
                case = Case(Elementwise(wide.shape[-1]), wide, torch.zeros_like(wide), 1)
                figures += auto_figures(case, name, nn.functional.mse_loss, arguments.pairs)
            continue
        module = ByteLSTM(arguments.width) if name == "nn.LSTM" else ByteCell(arguments.width)
        case = Case(module, inputs, targets, 32)
        if arguments.part == "budgets":
            scale = 20 if arguments.quick else 1  # tiny sizes have hardly more than fixed parts
            figures += budget_figures(case, name, arguments.pairs, scale, arguments.shares)
        else:
            figures += auto_figures(case, name, byte_loss, arguments.pairs)
    publish(f"budget_time_{arguments.part}", figures, arguments)


if __name__ == "__main__":
    main()
