"""What do schedules cost where a state is as large as what a step makes?

One window (k1 = k2 = T, no optimizer) of a simulated reaction and diffusion on a grid, explicit in
time, whose three rates are learned. A state is two fields of the grid; a step keeps some two and a
half times as much for its gradient. Each way is held against plain BPTT by hand, which retains all
of it, in time and in peak: tensor bytes above weights, inputs and gradients, in states. Budgets are
what is there in any case and so many states. States in a file lie in a folder of `--folder`.

    python -m benchmarks.large_states --folder /scratch
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.paired import time_pairs
from benchmarks.recomputation import peak_bytes_of
from benchmarks.report import Figure, add_output_arguments, publish
from tbptt_ckpt import TBPTT, InfeasibleBudgetError, TensorSequence
from tbptt_ckpt.executor import ReplayExecutor

BUDGETS = (40, 80, 160)  # in states


class ReactionDiffusion(nn.Module):
    """One explicit step of the Gray-Scott equations; the input feeds the first field."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = nn.Parameter(torch.tensor([0.16, 0.08, 0.06]))

    def forward(self, feed: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        spread = state.roll(1, -1) + state.roll(-1, -1) + state.roll(1, -2) + state.roll(-1, -2)
        spread = spread - 4 * state
        u, v = state.unbind(1)
        reaction = u * v * v
        u_next = u + self.rates[0] * spread[:, 0] - reaction + feed * (1 - u)
        v_next = v + self.rates[1] * spread[:, 1] + reaction - (feed + self.rates[2]) * v
        state = torch.stack([u_next, v_next], 1)
        return state.mean((-1, -2)), state


def first_state(grid: int) -> Tensor:
    """[1, 2, grid, grid]: one field everywhere, the other in the middle."""
    torch.manual_seed(0)
    state = torch.stack([torch.ones(grid, grid), torch.zeros(grid, grid)])
    low, high = grid // 3, 2 * grid // 3
    state[0, low:high, low:high], state[1, low:high, low:high] = 0.5, 0.25
    return (state + 0.01 * torch.rand(2, grid, grid))[None]


class Case:
    """The simulation, what it is compared with, and the ways to differentiate it."""

    def __init__(self, steps: int, grid: int) -> None:
        self.module, self.state = ReactionDiffusion(), first_state(grid)
        self.inputs = torch.full((steps, 1, 1, 1), 0.035)
        self.targets = torch.rand(steps, 1, 2)
        self.data = TensorSequence(self.inputs, self.targets)
        held = (self.inputs, self.targets, self.state)
        self.held_bytes = sum(tensor.nbytes for tensor in held)

    def plain(self) -> None:
        """Plain BPTT by hand."""
        self.module.zero_grad()
        state, total = self.state, torch.zeros(())
        for x, target in zip(self.inputs.unbind(), self.targets.unbind(), strict=True):
            y, state = self.module(x, state)
            total = total + nn.functional.mse_loss(y, target)
        (total / len(self.inputs)).backward()

    def windowed(self, **choices: object) -> Callable[[], None]:
        """The package."""
        steps = len(self.inputs)
        tbptt = TBPTT(self.module, nn.functional.mse_loss, steps, steps, **choices)

        def run() -> None:
            self.module.zero_grad()
            tbptt.train(self.data, self.state)

        return run

    def gradient(self, run: Callable[[], None]) -> Tensor:
        """What a run leaves."""
        run()
        assert self.module.rates.grad is not None, "the rates are learned"
        return self.module.rates.grad.clone()


def ways(case: Case, folder: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """Fixed strategies, and the fastest plans within budgets; with states here and there."""
    stores = {"in memory": "replay", "in a file": ReplayExecutor(folder)}
    for strategy in ("retain", "sqrt"):
        yield strategy, {"strategy": strategy}
    yield "sqrt, in a file", {"strategy": "sqrt", "executor": stores["in a file"]}
    for states in BUDGETS:
        budget = case.held_bytes + states * case.state.nbytes
        for where, executor in stores.items():
            name = f"optimal in {states} states, {where}"
            yield name, {"memory_budget": budget, "strategy": "optimal", "executor": executor}


def compare(case: Case, name: str, choices: dict[str, object], pairs: int) -> Figure | None:
    """Time over plain BPTT, the peak, the runs of a step; None where nothing fits."""
    run = case.windowed(**choices)
    try:
        found = case.gradient(run)
    except InfeasibleBudgetError as error:
        print(f"{name}: {error}", flush=True)
        return None
    expected, peak = case.gradient(case.plain), peak_bytes_of(run)
    times = time_pairs(case.plain, run, pairs)
    error = float((found - expected).norm() / expected.norm())
    details = {"peak in states": peak / case.state.nbytes, "gradient off by": error}
    return Figure(name, times.ratio, "x plain", interval=times.interval, details=details)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--folder", type=Path, default=Path("/tmp"), help="for states in a file")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--grid", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=5)
    add_output_arguments(parser, threads=1)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps, arguments.grid, arguments.pairs = 60, 16, 1
    torch.set_num_threads(arguments.threads)
    case, figures = Case(arguments.steps, arguments.grid), []
    for name, choices in ways(case, arguments.folder):
        figure = compare(case, name, choices, arguments.pairs)
        if figure is not None:
            print(figure.line(), flush=True)
            figures.append(figure)
    publish("large_states", figures, arguments)


if __name__ == "__main__":
    main()
