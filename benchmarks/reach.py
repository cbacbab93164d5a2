"""How far back does the gradient of an LSTM reach, and what does it take to know?

Three LSTMs as torch initialises them, with forget biases that are higher by 0, 2 and 5. The reach
is measured exactly, in several windows, and by the sketches of a training whose weights stay as
they are; the time that those take is held against that of the windows.

    python -m benchmarks.reach --plot docs/reach.png
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.report import add_output_arguments, markdown_table, print_origin, write_result
from tbptt_ckpt import TBPTT, TensorSequence, measure_costs, plan
from tbptt_ckpt.engine import Reach, reach_gauge
from tbptt_ckpt.profiling import MeasuredReach, measure_reach
from tbptt_ckpt.profiling.environment import describe_environment

BIASES = (0.0, 2.0, 5.0)
COLOURS = ("#0072B2", "#E69F00", "#D55E00")
TOLERANCES = (1e-2, 1e-3, 1e-5)


class Readout(nn.Module):
    """`nn.LSTM`, whose forget gates begin `bias` higher, and one output."""

    def __init__(self, width: int, bias: float) -> None:
        super().__init__()
        self.core, self.out = nn.LSTM(width, width), nn.Linear(width, 1)
        with torch.no_grad():
            self.core.bias_ih_l0[width : 2 * width] += bias

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = self.core(x, state)
        return self.out(y), state


def problem(arguments: argparse.Namespace, bias: float) -> tuple[nn.Module, Tensor, Tensor]:
    """A module, random inputs and targets: the same every time."""
    torch.manual_seed(0)
    module = Readout(arguments.width, bias)
    shape = ((arguments.windows + 1) * arguments.k2, arguments.lanes)
    return module, torch.randn(*shape, arguments.width), torch.randn(*shape, 1)


def exact(arguments: argparse.Namespace, bias: float) -> MeasuredReach:
    module, x, y = problem(arguments, bias)
    reach = {"k1": arguments.k1, "k2": arguments.k2, "windows": arguments.windows}
    return measure_reach(module, F.mse_loss, x, y, tolerances=TOLERANCES, per_step=False, **reach)


def sketched(arguments: argparse.Namespace, bias: float) -> tuple[list[Any], float]:
    """What whole windows say, and the share of their time that it takes."""
    module, x, y = problem(arguments, bias)
    spent, known = [0.0], reach_gauge.sketch

    def timed(weights: Sequence[Tensor]) -> Any:
        begun = time.perf_counter()
        row = known(weights)
        spent[0] += time.perf_counter() - begun
        return row

    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    strategy = f"uniform:{arguments.leaf}"
    tbptt = TBPTT(
        module, F.mse_loss, arguments.k1, arguments.k2, optimizer, strategy=strategy, per_step=False
    )
    with mock.patch.object(reach_gauge, "sketch", timed):
        begun = time.perf_counter()
        windows = list(tbptt.windows(TensorSequence(x, y)))
        share = spent[0] / (time.perf_counter() - begun)
    return [w.decay for w in windows if w.decay and w.stop - w.start == arguments.k2], share


def spread(reaches: Sequence[Reach]) -> str:
    """The steps that are enough, in the windows at hand: least, middle and most."""
    if not reaches:
        return "none measured"
    if any(reach.within is None for reach in reaches):
        return f"more than {min(reach.above for reach in reaches):,}"
    steps = sorted(reach.steps for reach in reaches)
    return f"{median(steps):g} ({steps[0]} to {steps[-1]})"


def prices(arguments: argparse.Namespace) -> list[tuple[int, float, float, float]]:
    """For some k2: MiB under "sqrt" and of plain BPTT, and seconds of an update under "sqrt"."""
    module, x, y = problem(arguments, 0.0)
    some = slice(0, min(256, len(x)))
    costs = measure_costs(module, F.mse_loss, x[some], y[some], per_step=False)
    found = []
    for k2 in range(arguments.k2 // 10, arguments.k2 + 1, arguments.k2 // 10):
        new = {"new_steps": min(arguments.k1, k2)}
        ours, plain = (plan(k2, costs, strategy=s, **new) for s in ("sqrt", "retain"))
        peaks = [each.predicted_peak_bytes / 2**20 for each in (ours, plain)]
        found.append((k2, *peaks, ours.predicted_seconds))
    return found


def draw(
    measured: Mapping[float, MeasuredReach],
    costs: Sequence[tuple[int, float, float, float]],
    title: str,
    path: Path,
) -> None:
    """What is missing of the gradient, and the state's own, above what it costs to go that far."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(7.6, 6.4), dpi=150, layout="constrained")
    above, middle, below = picture.subplots(3, 1, sharex=True, height_ratios=(3, 2, 2))
    for (bias, found), colour in zip(measured.items(), COLOURS, strict=True):
        for number, decay in enumerate(found.decays):
            label = f"forget bias +{bias:g}" if number == 0 else None
            errors = [(b.steps_back, b.error) for b in decay.borders if b.error > 5e-7]
            norms = [(b.steps_back, b.norm) for b in decay.borders if b.norm and b.norm > 1e-12]
            above.plot(*zip(*errors, strict=True), color=colour, linewidth=1, label=label)
            middle.plot(*zip(*norms, strict=True), color=colour, linewidth=1)
    for tolerance in TOLERANCES:
        above.axhline(tolerance, color="#999999", linewidth=0.8, linestyle=":")
    above.set_yscale("log")
    middle.set_yscale("log")
    above.set_ylabel("missing of the\nweights' gradient")
    middle.set_ylabel("norm of the\nstate's gradient")
    above.legend(frameon=False, loc="center right")
    steps, ours, plain, seconds = zip(*costs, strict=True)
    below.plot(steps, plain, color="#999999", linestyle="--", label="plain BPTT")
    below.plot(steps, ours, color="#000000", label="strategy sqrt")
    below.set_ylabel("peak, MiB")
    right = below.twinx()
    right.plot(steps, seconds, color="#CC79A7", linestyle="-.", label="time of an update, sqrt")
    right.set_ylabel("s")
    right.set_ylim(0)
    below.set_ylim(0)
    lines = [*below.get_lines(), *right.get_lines()]
    below.legend(handles=lines, frameon=False, loc="upper left")
    below.set_xlabel("steps back, and k2")
    above.set_title(title, fontsize=9, loc="left")
    FigureCanvasAgg(picture).print_figure(str(path))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--k1", type=int, default=50)
    parser.add_argument("--k2", type=int, default=1000)
    parser.add_argument("--lanes", type=int, default=8)
    parser.add_argument("--width", type=int, default=128, help="of inputs and state")
    parser.add_argument("--leaf", type=int, default=25, help="steps, of the training")
    parser.add_argument("--windows", type=int, default=3, help="that are measured exactly")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the picture")
    add_output_arguments(parser)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.k1, arguments.k2, arguments.width, arguments.leaf = 5, 60, 8, 5
    return arguments


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    environment, measured, rows, payload = describe_environment(), {}, [], {}
    for bias in BIASES:
        measured[bias] = found = exact(arguments, bias)
        decays, share = sketched(arguments, bias)
        for tolerance in TOLERANCES:
            exactly = [decay.reach(tolerance) for decay in found.decays]
            in_windows = [decay.reach(tolerance) for decay in decays]
            cells = (f"+{bias:g}", f"{tolerance:g}", spread(exactly), spread(in_windows))
            rows.append((*cells, f"{100 * share:.2f} %", f"{found.growth:.2g}"))
        payload[f"+{bias:g}"] = {
            "decays": [asdict(decay) for decay in found.decays],
            "sketched": [asdict(decay) for decay in decays],
            "share": share,
        }
    head = ("forget bias", "error", "exact reach", "leaves of the training", "time", "growth")
    print(markdown_table(head, rows))
    print_origin(environment, arguments)
    if arguments.plot is not None:
        title = (
            f"nn.LSTM of width {arguments.width}, {arguments.lanes} lanes, freshly initialised: "
            f"losses in the last {arguments.k1} of {arguments.k2:,} steps"
        )
        draw(measured, prices(arguments), title, arguments.plot)
    if arguments.json is not None:
        write_result("reach", environment, arguments, payload)


if __name__ == "__main__":
    main()
