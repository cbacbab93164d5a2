"""What do single windows miss at the k2 that `k2="auto"` chooses, and how old do states get?

Five nets learn to say what they saw ten steps before, beside noise. In one run every window is
audited, so that of each it is known what it would have missed at the size chosen then, relative to
its own gradient. The rule looks at the mean of that, and lets single windows miss more. In another
run audits come as they do, and `drift` says how far recorded states were from today's.

    python -m benchmarks.auto_k2_windows
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.report import Figure, add_output_arguments, publish
from tbptt_ckpt import TBPTT, TensorSequence, WindowResult
from tbptt_ckpt.engine import reach_rule

K1, MAX_K2, WIDTH, LANES, DELAY = 8, 128, 32, 8, 10


class Net(nn.Module):
    """A recurrent layer and a readout."""

    def __init__(self, layer: nn.Module, forget_bias: float = 0.0) -> None:
        super().__init__()
        self.layer, self.readout = layer, nn.Linear(WIDTH, 4)
        if forget_bias:
            with torch.no_grad():
                layer.bias_ih_l0[WIDTH : 2 * WIDTH] += forget_bias

    def forward(self, inputs: Tensor, state: object) -> tuple[Tensor, object]:
        """Inputs [T, B, 4] to outputs [T, B, 4]."""
        hidden, state = self.layer(inputs, state)
        return self.readout(hidden), state


NETS: dict[str, Callable[[], Net]] = {
    "RNN": lambda: Net(nn.RNN(4, WIDTH)),
    "GRU": lambda: Net(nn.GRU(4, WIDTH)),
    "LSTM": lambda: Net(nn.LSTM(4, WIDTH)),
    "LSTM, forget bias +2": lambda: Net(nn.LSTM(4, WIDTH), 2.0),
    "two layers of LSTM": lambda: Net(nn.LSTM(4, WIDTH, 2)),
}


def data(num_steps: int) -> TensorSequence:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(num_steps, LANES, 4, generator=generator)
    noise = torch.randn(num_steps, LANES, 4, generator=generator)
    return TensorSequence(inputs, inputs.roll(DELAY, 0) + 0.3 * noise)


def train(make: Callable[[], Net], num_windows: int) -> list[WindowResult]:
    torch.manual_seed(0)
    net = make()
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    tbptt = TBPTT(
        *(net, nn.functional.mse_loss, K1, "auto", optimizer),
        **{"max_k2": MAX_K2, "per_step": False, "clip_grad_norm": 1.0, "strategy": "retain"},
    )
    return list(tbptt.windows(data(num_windows * K1)))


def every_window_audited(make: Callable[[], Net], num_windows: int) -> list[WindowResult]:
    fewest, most = reach_rule._FEWEST, reach_rule._MOST
    reach_rule._FEWEST = reach_rule._MOST = 0
    try:
        return train(make, num_windows)
    finally:
        reach_rule._FEWEST, reach_rule._MOST = fewest, most


def figure_of(name: str, make: Callable[[], Net], num_windows: int) -> Figure:
    chosen = [w.chosen_k2 for w in every_window_audited(make, num_windows) if w.chosen_k2]
    known = [c for c in chosen if c.missing is not None]
    errors = torch.tensor([c.audited_error or 0.0 for c in known])
    means = torch.tensor([c.missing or 0.0 for c in known])
    windows = train(make, num_windows)
    reached = [w.stop - w.start for w in windows if w.chosen_k2 and not w.chosen_k2.is_audit]
    drifts = torch.tensor([w.drift for w in windows])
    return Figure(
        what=name,
        measured=float(errors.quantile(0.95)),
        unit="of a window's gradient missed, 95 % miss less",
        details={
            "middle": float(errors.median()),
            "99 %": float(errors.quantile(0.99)),
            "worst": float(errors.max()),
            "of the mean, 95 %": float(means.quantile(0.95)),
            "windows": len(known),
            "mean reach": sum(reached) / max(1, len(reached)),
            "drift, middle": float(drifts.median()),
            "drift, worst": float(drifts.max()),
        },
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=300, help="of each net")
    add_output_arguments(parser, threads=1)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.windows = 40
    return arguments


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    figures = []
    for name, make in NETS.items():
        figures.append(figure_of(name, make, arguments.windows))
        print(figures[-1].line(), flush=True)
    publish("auto_k2_windows", figures, arguments)


if __name__ == "__main__":
    main()
