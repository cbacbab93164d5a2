"""Does "auto" take the form of steps that is the fastest within a budget?

Windows over all steps (k1 = k2 = T, no optimizer) within a share of the memory of plain BPTT.
Every form that can be asked for is run by itself, each with the fastest plan that fits; the fastest
of them is then timed in turns with "auto", which measures forms before its first window. That time
is not in the figure: a run has it once.

    python -m benchmarks.forms
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass

import torch

from benchmarks.paired import time_pairs, timed
from benchmarks.recomputation import peak_bytes_of
from benchmarks.report import Figure, add_output_arguments, publish
from benchmarks.time_batching import Case, Size
from tbptt_ckpt import TBPTT, InfeasibleBudgetError, TensorSequence

MOST = 1.03
_TRIALS = 5  # of each form, to find the fastest


@dataclass(frozen=True)
class Setting:
    """A cell as in `benchmarks.time_batching`, and a share of plain BPTT's peak."""

    cell: str
    lanes: int
    width: int
    num_steps: int
    share: float

    def __str__(self) -> str:
        return f"{self.cell} {self.lanes} x {self.width}, {self.num_steps} steps, {self.share:.0%}"


SETTINGS = (
    Setting("Recurrent LSTMCell", 4, 96, 500, 0.10),
    Setting("Recurrent LSTMCell", 16, 192, 400, 0.05),
    Setting("Recurrent LSTMCell", 8, 384, 300, 0.20),
    Setting("Recurrent LSTMCell", 48, 256, 200, 0.10),
    Setting("Recurrent GRUCell", 16, 128, 500, 0.10),
    Setting("Recurrent GRUCell", 4, 384, 300, 0.05),
    Setting("Recurrent RNNCell", 8, 512, 300, 0.20),
    Setting("LSTMCell", 8, 320, 300, 0.10),
    Setting("GRUCell", 24, 320, 200, 0.05),
    Setting("deep", 16, 384, 300, 0.10),
)


class Bounded:
    """Windows of a setting within its bytes, in one form."""

    def __init__(self, case: Case, time_batching: object, budget_bytes: int) -> None:
        num_steps = len(case.inputs)
        self._case = case
        self._tbptt = TBPTT(
            case.module,
            torch.nn.functional.cross_entropy,
            num_steps,
            num_steps,
            memory_budget=budget_bytes,
            time_batching=time_batching,
        )

    def __call__(self) -> None:
        case = self._case
        case.module.zero_grad()
        (self.window,) = self._tbptt.windows(TensorSequence(case.inputs, case.targets), case.state)


def figure_of(setting: Setting, num_pairs: int) -> Figure:
    """Time of "auto" over that of the fastest form."""
    size = Size(setting.cell, setting.lanes, setting.width, setting.num_steps, 1, 1.0, 1.0)
    case = Case(size)
    budget = case.given_bytes + int(setting.share * peak_bytes_of(case.plain))
    words: dict[str, object] = {"plain": False, "batched": True}
    if "LSTMCell" in setting.cell:
        words |= {"fused": "fused", "mixed": "mixed"}
    forms, seconds = {}, {}
    for form, choice in words.items():
        forms[form] = Bounded(case, choice, budget)
        try:
            seconds[form] = statistics.median(timed(forms[form]) for _ in range(3 + _TRIALS))
        except InfeasibleBudgetError:
            continue
    fastest = min(seconds, key=seconds.__getitem__)
    auto = Bounded(case, "auto", budget)
    times = time_pairs(forms[fastest], auto, num_pairs, num_warmups=4)
    taken = auto.window.plan.form
    figure = Figure(
        f"{setting}: {taken}, fastest {fastest}",
        times.ratio,
        "x",
        MOST,
        times.interval,
        {"budget MiB": budget / 2**20, **{f"{form} s": s for form, s in seconds.items()}},
    )
    print(figure.line(), "|", auto.window.plan, flush=True)
    return figure


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--only", default="", help="settings whose name contains this")
    add_output_arguments(parser)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    settings = [each for each in SETTINGS if arguments.only in str(each)]
    if arguments.quick:
        arguments.pairs = 2
        settings = [Setting(cell, 2, 16, 60, 0.5) for cell in ("LSTMCell", "Recurrent LSTMCell")]
    publish("forms", [figure_of(each, arguments.pairs) for each in settings], arguments)


if __name__ == "__main__":
    main()
