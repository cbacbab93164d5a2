"""Does the reach of an update matter? A symbol must be reproduced `d` steps after it was shown.

Every lane reads a stream. At times a cue (one of 8 symbols) is shown; `d` steps later, after
noise symbols of an alphabet of their own, a question mark asks for it. Only those answers have a
loss. An update learns to remember only if its window contains an answer together with its
cue, `d + 1` steps: `k2` decides that, `k1` only how often weights change.

A random recurrent network already remembers a little, and a short window can learn to
exploit what the carried state happens to hold. So by default the weights that read cues
start at zero. They can leave zero only through a gradient that reaches back from an answer
to its cue, so that short windows stay at chance for a reason and not by luck.
`--start default` keeps torch's own start instead.

    python -m benchmarks.delayed_recall
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.report import Figure, add_output_arguments, publish
from tbptt_ckpt import TBPTT, TensorSequence

NUM_SYMBOLS = 8
NUM_CODES = 2 * NUM_SYMBOLS + 1  # cues, noise, the question mark
QUESTION = 2 * NUM_SYMBOLS


@dataclass(frozen=True)
class Setting:
    """One row: how often to update, and how far back."""

    k1: int
    k2: int
    note: str


class Recaller(nn.Module):
    """An LSTM over a segment of one-hot codes, and a readout.

    Args:
        width: Units.
        blind_to_cues: Whether the weights that read cues start at zero.
    """

    def __init__(self, width: int, blind_to_cues: bool) -> None:
        super().__init__()
        self.lstm = nn.LSTM(NUM_CODES, width)
        self.readout = nn.Linear(width, NUM_SYMBOLS)
        with torch.no_grad():
            self.lstm.bias_ih_l0[width : 2 * width] = 1.0  # forget gates start open
            if blind_to_cues:
                self.lstm.weight_ih_l0[:, :NUM_SYMBOLS] = 0.0

    def forward(self, codes: Tensor, state: object) -> tuple[Tensor, object]:
        """`codes` [n, B] to logits [n, B, 8]."""
        hidden, state = self.lstm(nn.functional.one_hot(codes, NUM_CODES).float(), state)
        return self.readout(hidden), state


def recall_stream(num_steps: int, num_lanes: int, delay: int, seed: int) -> TensorSequence:
    """Codes [T, B], targets [T, B], and a weight [T] that is one where an answer is due.

    Episodes follow each other after random pauses, so that they fall on no grid of windows.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    codes = draw(NUM_SYMBOLS, 2 * NUM_SYMBOLS, num_steps, num_lanes)
    targets, weight = torch.zeros_like(codes), torch.zeros(num_steps)
    step = int(draw(0, delay, 1))
    while step + delay < num_steps:
        cue = draw(0, NUM_SYMBOLS, num_lanes)
        codes[step], codes[step + delay] = cue, QUESTION
        targets[step + delay], weight[step + delay] = cue, 1.0
        step += delay + 1 + int(draw(0, delay // 2, 1))
    return TensorSequence(codes, targets, weight=weight)


def recall_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def accuracy(model: Recaller, stream: TensorSequence) -> float:
    """Share of right answers, in percent."""
    with torch.no_grad():
        logits, _ = model(stream.inputs, None)
    right = (logits.argmax(-1) == stream.targets).float().mean(1)
    assert stream.weight is not None
    return 100 * float(right[stream.weight > 0].mean())


@dataclass(frozen=True)
class Outcome:
    """One run: percent right on a stream of its own, and what it took."""

    right: float
    updates: int
    cpu_seconds: float
    largest_cue_weight: float


def run(setting: Setting, arguments: argparse.Namespace, seed: int) -> Outcome:
    torch.manual_seed(seed)
    model = Recaller(arguments.width, arguments.start == "blind")
    optimizer = torch.optim.Adam(model.parameters(), lr=arguments.lr)
    tbptt = TBPTT(
        model, recall_loss, setting.k1, setting.k2, optimizer, per_step=False, clip_grad_norm=1.0
    )
    stream = recall_stream(arguments.steps, arguments.lanes, arguments.delay, 1000 + seed)
    begun = time.process_time()
    updates = sum(window.updated for window in tbptt.windows(stream))
    seconds = time.process_time() - begun
    held_out = recall_stream(12_000, arguments.lanes, arguments.delay, 2000 + seed)
    cue_weights = model.lstm.weight_ih_l0[:, :NUM_SYMBOLS].detach()
    return Outcome(accuracy(model, held_out), updates, seconds, float(cue_weights.abs().max()))


def settings_for(delay: int) -> list[Setting]:
    """Reaches below and above the `delay + 1` steps from a cue to its answer."""
    k1, half = max(1, delay // 3), max(1, delay // 2)
    return [
        Setting(k1, k1, "k1 = k2 < d"),
        Setting(half, half, "k1 = k2 < d"),
        Setting(delay, delay, "k1 = k2 = d, one step short"),
        Setting(k1, delay, "k1 < k2 = d, one step short"),
        Setting(k1, delay + 1, f"k1 < d < k2, 1 answer in {k1} is reached"),
        Setting(k1, delay + k1, "k1 < d < k2, every answer is reached"),
        Setting(2 * delay, 2 * delay, "d < k1 = k2, half the answers are reached"),
    ]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--delay", type=int, default=12, help="steps from a cue to its answer")
    parser.add_argument("--steps", type=int, default=30_000, help="time steps per lane")
    parser.add_argument("--lanes", type=int, default=32)
    parser.add_argument("--width", type=int, default=48)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each setting")
    parser.add_argument("--start", choices=("blind", "default"), default="blind")
    add_output_arguments(parser, threads=1)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.delay, arguments.steps, arguments.seeds = 6, 600, 1
    return arguments


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    figures = []
    for setting in settings_for(arguments.delay):
        runs = [run(setting, arguments, seed) for seed in range(arguments.seeds)]
        rights = sorted(outcome.right for outcome in runs)
        figure = Figure(
            what=f"k1 = {setting.k1}, k2 = {setting.k2} ({setting.note})",
            measured=sum(rights) / len(rights),
            unit="% right",
            interval=(rights[0], rights[-1]),
            details={
                "updates": runs[0].updates,
                "largest cue weight": max(outcome.largest_cue_weight for outcome in runs),
                "CPU seconds per run": max(outcome.cpu_seconds for outcome in runs),
            },
        )
        figures.append(figure)
        print(figure.line(), flush=True)
    figures.append(Figure("chance", 100 / NUM_SYMBOLS, "% right"))
    publish("delayed_recall", figures, arguments, interval_is="least and most over the seeds")


if __name__ == "__main__":
    main()
