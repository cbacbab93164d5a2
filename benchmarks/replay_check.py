"""What does it cost to compare replays with the runs that they repeat, and to deliver once?

Windows over all steps, recomputed in leaves, with the check of replays and without, in turns: a
loop over `nn.LSTMCell` and `nn.LSTM` in segments. The limit is 1.01 for leaves of eight steps and
more, and 1.03 for shorter ones. `--cost once` has the time with `deliver="once"` over the time
without, `--cost hooks` that with a hook on each weight over that with none; their limit is 1.01.

    python -m benchmarks.replay_check
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.paired import time_pairs
from benchmarks.recomputation import ByteCell, ByteLSTM, Case
from benchmarks.report import Figure, add_output_arguments, publish

MOST, MOST_OF_SHORT, SHORT = 1.01, 1.03, 8


@dataclass(frozen=True)
class Setting:
    """A module, and how it is cut."""

    kind: type[ByteCell] | type[ByteLSTM]
    lanes: int
    width: int
    leaf: int
    num_steps: int

    def __str__(self) -> str:
        kind = "LSTMCell" if self.kind is ByteCell else "nn.LSTM"
        return f"{kind} {self.lanes} x {self.width}, leaves of {self.leaf}"


SETTINGS = (
    Setting(ByteCell, 32, 256, 32, 256),
    Setting(ByteCell, 8, 64, 32, 512),
    Setting(ByteCell, 8, 64, 8, 512),
    Setting(ByteCell, 8, 64, 4, 256),
    Setting(ByteLSTM, 32, 256, 32, 256),
    Setting(ByteLSTM, 8, 64, 32, 2048),
    Setting(ByteLSTM, 8, 64, 8, 1024),
    Setting(ByteLSTM, 8, 64, 4, 512),
)


def measure(setting: Setting, num_pairs: int, cost: str) -> Figure:
    """Time with what costs over time without."""
    torch.manual_seed(0)
    shape = setting.num_steps, setting.lanes
    inputs, targets = torch.randn(*shape, setting.width), torch.randint(0, 256, shape)
    case = Case(setting.kind(setting.width), inputs, targets, setting.leaf)
    without, treated = ways(case, cost)
    times = time_pairs(without, treated, num_pairs, num_warmups=10)  # then less is compared
    most = MOST_OF_SHORT if setting.leaf < SHORT and cost == "check" else MOST
    figure = Figure(f"{cost}: {setting}", times.ratio, "x", most, times.interval, times.seconds())
    print(figure.line(), flush=True)
    return figure


def ways(case: Case, cost: str) -> tuple[Callable[[], float], Callable[[], float]]:
    """A window without something that costs, and with it."""
    if cost == "check":
        without, treated = (case.recomputed("replay", check_replays=c) for c in (False, True))
        return without, treated
    plain = case.recomputed("replay")
    if cost == "once":
        return plain, case.recomputed("replay", deliver="once")

    def hooked() -> float:
        handles = [w.register_hook(lambda grad: grad) for w in case.module.parameters()]
        loss = plain()
        for handle in handles:
            handle.remove()
        return loss

    return plain, hooked


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--cost", choices=("check", "once", "hooks"), default="check")
    parser.add_argument("--only", default="", help="settings whose name contains this")
    add_output_arguments(parser)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    settings = [each for each in SETTINGS if arguments.only in str(each)]
    if arguments.quick:
        arguments.pairs = 2
        settings = [Setting(kind, 2, 8, 4, 16) for kind in (ByteCell, ByteLSTM)]
    publish(
        "replay_check",
        [measure(each, arguments.pairs, arguments.cost) for each in settings],
        arguments,
    )


if __name__ == "__main__":
    main()
