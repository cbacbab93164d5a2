"""What does the package cost where nothing is recomputed?

`TBPTT` against a loop written by hand that does the same work: windows of 64 steps with
k1 = k2, one SGD step each, the state carried on detached, everything retained. Both start
from the same weights and must end with the same ones.

    python -m benchmarks.overhead
"""

from __future__ import annotations

import argparse
import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.paired import time_pairs
from benchmarks.report import Figure, add_output_arguments, publish
from tbptt_ckpt import TBPTT, TensorSequence

Batch = tuple[Tensor, Tensor]  # inputs [T, B, F], targets [T, B]: the output is taken as logits
Loop = Callable[[nn.Module, torch.optim.Optimizer, Batch, int], float]

LIMIT_FUSED, LIMIT_CELL = 1.03, 1.05


def step_loss(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, target)


def segment_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def fused_by_hand(
    lstm: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, k1: int
) -> float:
    """`nn.LSTM`, a window in a call."""
    total, state = torch.zeros(()), None
    for inputs, targets in zip(batch[0].split(k1), batch[1].split(k1), strict=True):
        optimizer.zero_grad(set_to_none=True)
        outputs, (h, c) = lstm(inputs, state)
        loss = segment_loss(outputs, targets)
        loss.backward()
        optimizer.step()
        state = (h.detach(), c.detach())
        total += loss.detach() * len(inputs)
    return float(total / len(batch[0]))


def cell_by_hand(cell: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, k1: int) -> float:
    """A loop over `nn.LSTMCell`, with a loss at each step."""
    total, state = torch.zeros(()), None
    for inputs, targets in zip(batch[0].split(k1), batch[1].split(k1), strict=True):
        optimizer.zero_grad(set_to_none=True)
        summed: Tensor | None = None
        for x, target in zip(inputs.unbind(), targets.unbind(), strict=True):
            state = cell(x, state)
            loss = step_loss(state[0], target)
            summed = loss if summed is None else summed + loss
        (summed / len(inputs)).backward()
        optimizer.step()
        state = (state[0].detach(), state[1].detach())
        total += summed.detach()
    return float(total / len(batch[0]))


def cell_by_hand_stacked(
    cell: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, k1: int
) -> float:
    """The same with one loss call for a window: less work than a loss at each step."""
    total, state = torch.zeros(()), None
    for inputs, targets in zip(batch[0].split(k1), batch[1].split(k1), strict=True):
        optimizer.zero_grad(set_to_none=True)
        outputs = []
        for x in inputs.unbind():
            state = cell(x, state)
            outputs.append(state[0])
        loss = segment_loss(torch.stack(outputs), targets)
        loss.backward()
        optimizer.step()
        state = (state[0].detach(), state[1].detach())
        total += loss.detach() * len(inputs)
    return float(total / len(batch[0]))


def by_package(module: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, k1: int) -> float:
    loss_fn = segment_loss if isinstance(module, nn.LSTM) else step_loss
    tbptt = TBPTT(module, loss_fn, k1, k1, optimizer, strategy="retain")
    loss = tbptt.train(TensorSequence(*batch)).loss
    assert loss is not None, "every step has a target"
    return loss


def check_same_work(some: Loop, other: Loop, module: nn.Module, batch: Batch, k1: int) -> None:
    """Raise unless both give the same mean loss and the same weights."""
    results = []
    for loop in (some, other):
        trained = copy.deepcopy(module)
        loss = loop(trained, torch.optim.SGD(trained.parameters(), lr=0.1), batch, k1)
        results.append([torch.tensor(loss), *(p.detach() for p in trained.parameters())])
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-5)


def compare(
    what: str,
    loops: tuple[Loop, Loop],
    module: nn.Module,
    limit: float | None,
    arguments: argparse.Namespace,
) -> Figure:
    """Time of the second loop over that of the first."""
    batch = random_batch(arguments)
    check_same_work(*loops, module, batch, arguments.window)
    runs = []
    for loop in loops:
        trained = copy.deepcopy(module)
        optimizer = torch.optim.SGD(trained.parameters(), lr=1e-3)
        runs.append(functools.partial(loop, trained, optimizer, batch, arguments.window))
    times = time_pairs(*runs, num_pairs=arguments.pairs)
    figure = Figure(what, times.ratio, "x", limit, times.interval, times.seconds())
    print(figure.line(), flush=True)
    return figure


def random_batch(arguments: argparse.Namespace) -> Batch:
    num_steps = arguments.window * arguments.windows
    torch.manual_seed(0)
    inputs = torch.randn(num_steps, arguments.lanes, arguments.width)
    return inputs, torch.randint(0, arguments.width, (num_steps, arguments.lanes))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--window", type=int, default=64, help="steps: k1 = k2")
    parser.add_argument("--windows", type=int, default=16, help="windows in a timed run")
    parser.add_argument("--lanes", type=int, default=32)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=40)
    add_output_arguments(parser)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.window, arguments.windows, arguments.lanes = 8, 2, 2
        arguments.width, arguments.pairs = 8, 4
    return arguments


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    fused = nn.LSTM(arguments.width, arguments.width)
    cell = nn.LSTMCell(arguments.width, arguments.width)
    figures = [
        compare("nn.LSTM", (fused_by_hand, by_package), fused, LIMIT_FUSED, arguments),
        compare("LSTMCell loop", (cell_by_hand, by_package), cell, LIMIT_CELL, arguments),
        compare(
            "LSTMCell loop, against one loss call per window",
            (cell_by_hand_stacked, by_package),
            cell,
            None,
            arguments,
        ),
        # What a ratio is where both sides are the same: the noise of the machine.
        compare("nn.LSTM by hand, twice", (fused_by_hand, fused_by_hand), fused, None, arguments),
        compare("LSTMCell by hand, twice", (cell_by_hand, cell_by_hand), cell, None, arguments),
    ]
    publish("overhead", figures, arguments)


if __name__ == "__main__":
    main()
