"""What grows with steps, lanes, width and ranks: bytes moved, bytes held, seconds.

One rank is simulated by the package's own costs and planner. What n ranks send each other goes by
a ring, in 2 (n - 1) hops and 2 (n - 1) / n of the bytes for each, with two constants: seconds a hop
and seconds a byte. A vote goes in n - 1 hops of its own. All three are measured here, between two
processes of this machine, and so are the seconds beside the simulated ones. More than two
ranks are only simulated: each as fast as the slower of the two, and the network this machine's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.report import add_output_arguments, markdown_table, print_origin, write_result
from tbptt_ckpt import TBPTT, Costs, TensorSequence, measure_costs, plan
from tbptt_ckpt.memory import format_bytes
from tbptt_ckpt.profiling.environment import describe_environment
from tbptt_ckpt.updates.ballots import Ballot

K1, K2 = 32, 128
INPUT, CLASSES = 32, 32
SHAPES = ((8, 256), (32, 256), (8, 512))  # lanes, width
RANKS = (1, 2, 10, 100, 1_000)
LENGTHS = (10_000, 1_000_000, 10**9)
BALLOT_BYTES = 8 * len(fields(Ballot))


class Cell(nn.Module):
    """An LSTM cell with a readout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cell, self.readout = nn.LSTMCell(INPUT, width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor, state: Any) -> Any:
        h, c = self.cell(x, state)
        return self.readout(h), (h, c)


@dataclass(frozen=True)
class Network:
    """Seconds a hop and a byte of a reduction, and a hop of a vote."""

    hop: float
    byte: float
    vote_hop: float

    def reduction(self, size: int, ranks: int) -> float:
        """Seconds of one all-reduce of `size` bytes."""
        return 2 * (ranks - 1) * self.hop + moved(size, ranks) * self.byte

    def vote(self, ranks: int) -> float:
        return (ranks - 1) * self.vote_hop


def moved(size: int, ranks: int) -> float:
    """Bytes that each rank sends in a reduction of `size` bytes."""
    return 2 * (ranks - 1) / ranks * size


def seconds_of(action: Callable[[], object], repeats: int) -> float:
    """The median of an action that ranks do together."""
    found = []
    for _ in range(repeats):
        dist.barrier()
        begun = time.perf_counter()
        action()
        found.append(time.perf_counter() - begun)
    return statistics.median(found)


def measure_network(repeats: int, size: int) -> Network:
    """The three constants, between two ranks."""
    little, much = torch.zeros(1), torch.zeros(size // 4)
    ballots = [torch.zeros(BALLOT_BYTES // 8, dtype=torch.float64) for _ in range(2)]
    least = seconds_of(lambda: dist.all_reduce(little), repeats)
    most = seconds_of(lambda: dist.all_reduce(much), max(3, repeats // 10))
    vote = seconds_of(lambda: dist.all_gather(ballots, ballots[dist.get_rank()]), repeats)
    return Network(hop=least / 2, byte=max(0.0, most - least) / size, vote_hop=vote)


def data_of(lanes: int, num_steps: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    inputs = torch.randn(num_steps, lanes, INPUT, generator=generator)
    return inputs, torch.randint(CLASSES, (num_steps, lanes), generator=generator)


def measured_seconds(lanes: int, width: int, windows: int, ranks: str | None) -> float:
    """A full window's seconds with its update, on this rank."""
    torch.manual_seed(0)
    cell = Cell(width)
    optimizer = torch.optim.SGD(cell.parameters(), lr=1e-3)
    how = {"strategy": "sqrt", "ranks": ranks, "time_batching": False}
    tbptt = TBPTT(cell, F.cross_entropy, K1, K2, optimizer, **how)
    found = []
    for window in tbptt.windows(TensorSequence(*data_of(lanes, K1 * windows + K2))):
        if window.stop - window.start == K2:
            found.append(window.seconds)
    return statistics.median(found[3:])  # weights are compared before the first three updates


def costs_of(lanes: int, width: int) -> tuple[Costs, int]:
    """Of one rank, and the bytes of its gradients."""
    torch.manual_seed(0)
    cell = Cell(width)
    optimizer = torch.optim.SGD(cell.parameters(), lr=1e-3)
    costs = measure_costs(
        cell, F.cross_entropy, *data_of(lanes, 64), None, optimizer=optimizer, time_batching=False
    )
    return costs, sum(weight.nbytes for weight in cell.parameters())


def slower(seconds: float) -> float:
    """The longer one of what all ranks say."""
    found = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def updates_table(network: Network, shapes: Sequence[Any], windows: int) -> list[list[str]]:
    """One update of windows of K2 steps, by lanes, width and ranks."""
    rows = []
    for lanes, width in shapes:
        costs, size = costs_of(lanes, width)
        planned = plan(K2, costs, strategy="sqrt", new_steps=K1)
        measured = {
            1: slower(measured_seconds(lanes, width, windows, None)),
            2: slower(measured_seconds(lanes, width, windows, "all")),
        }
        alone = slower(planned.predicted_seconds)
        for ranks in RANKS:
            buffer = size if ranks > 1 else 0
            seconds = alone + network.vote(ranks) * (ranks > 1) + network.reduction(size, ranks)
            held = planned.predicted_peak_bytes + buffer
            rows.append(
                [
                    f"{lanes} x {width}",
                    f"{ranks:,}",
                    format_bytes(int(moved(size, ranks)) + BALLOT_BYTES * (ranks - 1)),
                    format_bytes(held),
                    f"{1e3 * seconds:.1f} ms",
                    f"{1e3 * measured[ranks]:.1f} ms" if ranks in measured else "",
                    f"{alone / seconds:.2f}",
                    f"{10**9 / K1 * seconds / 86_400:,.1f}",
                ]
            )
    return rows


def lengths_table(shape: tuple[int, int], budget: int) -> list[list[str]]:
    """One window over a whole sequence (`k2=None`) within a budget."""
    costs, _ = costs_of(*shape)
    costs = replace(costs, fixed=replace(costs.fixed, step_inputs=0.0))  # they are in a file
    rows = []
    for num_steps in LENGTHS:
        begun = time.perf_counter()
        planned = plan(num_steps, costs, budget_bytes=budget)
        spent = time.perf_counter() - begun
        rows.append(
            [
                f"{num_steps:,}",
                format_bytes(planned.predicted_peak_bytes),
                f"{planned.executed_steps / num_steps:.2f}",
                f"{planned.num_boundaries:,}",
                f"{planned.predicted_seconds / num_steps * 1e3:.2f} ms",
                f"{planned.predicted_seconds / 86_400:,.3g}",
                f"{spent:.2f} s",
            ]
        )
    return rows


def on_rank(rank: int, port: int, arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    quick = arguments.quick
    network = measure_network(*((5, 1 << 16) if quick else (200, 16 << 20)))
    shapes = SHAPES[:1] if quick else SHAPES
    updates = updates_table(network, shapes, 6 if quick else 24)
    lengths = lengths_table(SHAPES[0], arguments.budget_mib << 20)
    if rank == 0:
        publish(network, updates, lengths, arguments)
    dist.destroy_process_group()


def publish(
    network: Network,
    updates: list[list[str]],
    lengths: list[list[str]],
    arguments: argparse.Namespace,
) -> None:
    print(
        f"a hop {1e6 * network.hop:.0f} us, a byte {1e9 * network.byte:.2f} ns "
        f"({1 / network.byte / 1e9 if network.byte else 0:.2f} GB/s), a hop of a vote "
        f"{1e6 * network.vote_hop:.0f} us\n"
    )
    header = ["lanes x width", "ranks", "sent by a rank", "held", "an update", "measured"]
    header += ["of one rank's speed", "days for 10^9 steps"]
    print(markdown_table(header, updates), "\n")
    header = ["steps", "held", "forwards a step", "states", "a step", "days", "planning"]
    print(markdown_table(header, lengths), "\n")
    environment = describe_environment()
    print_origin(environment, arguments)
    if arguments.json is not None:
        payload = {"network": vars(network), "updates": updates, "lengths": lengths}
        write_result("scale", environment, arguments, payload)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_output_arguments(parser, threads=1)
    parser.add_argument("--budget-mib", type=int, default=64, help="of a window of all steps")
    parser.add_argument("--port", type=int, default=29_481)
    arguments = parser.parse_args()
    torch.multiprocessing.spawn(on_rank, (arguments.port, arguments), nprocs=2)


if __name__ == "__main__":
    main()
