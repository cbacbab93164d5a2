"""What do single windows miss at the k2 that `k2="auto"` chooses, and how old do states get?

Five nets learn to say what they saw ten steps before, beside noise: with the rule as it is, which
looks at the mean of what is cut off, and with `k2_window_tolerance`. In one run every window
reaches all the way back, and the rule is told of those alone that would have been audited, so that
of each other one it is known what it would have missed at the size chosen then, relative to a
running norm. In another run audits come as they do, and `drift` says how far recorded states were
from today's.

    python -m benchmarks.auto_k2_windows
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.report import Figure, add_output_arguments, publish
from tbptt_ckpt import TBPTT, TensorSequence, WindowResult
from tbptt_ckpt.engine import auto_k2, reach_rule

K1, MAX_K2, WIDTH, LANES, DELAY = 8, 128, 32, 8, 10
LIMIT = 0.3  # of the running norm


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


class Watched(reach_rule.ReachRule):
    """Sees every window, and learns of those alone that would have been audited."""

    missed: ClassVar[list[tuple[float, int]]] = []  # over the running norm, at which size

    @property
    def is_due(self) -> bool:
        return True

    def audited(self, sums: Any, in_steps: Any) -> None:
        if super().is_due:
            super().audited(sums, in_steps)
            return
        missed = np.square(sums[-1] - sums[self.sizes.index(self.k2)]).sum()
        self.missed.append((float(np.sqrt(missed / self._power)), self.k2))
        self.ran()


def train(make: Callable[[], Net], num_windows: int, tolerance: float | None) -> list[WindowResult]:
    torch.manual_seed(0)
    net = make()
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    tbptt = TBPTT(
        *(net, nn.functional.mse_loss, K1, "auto", optimizer),
        **{"max_k2": MAX_K2, "k2_window_tolerance": tolerance, "per_step": False},
        **{"clip_grad_norm": 1.0, "strategy": "retain"},
    )
    return list(tbptt.windows(data(num_windows * K1)))


def watched(
    make: Callable[[], Net], num_windows: int, tolerance: float | None
) -> list[tuple[float, int]]:
    Watched.missed.clear()
    auto_k2.ReachRule = Watched
    try:
        train(make, num_windows, tolerance)
    finally:
        auto_k2.ReachRule = reach_rule.ReachRule
    return list(Watched.missed)


def figure_of(
    name: str, make: Callable[[], Net], num_windows: int, tolerance: float | None
) -> Figure:
    missed, sizes = zip(*watched(make, num_windows, tolerance), strict=True)
    errors = torch.tensor(missed)
    drifts = torch.tensor([w.drift for w in train(make, num_windows, tolerance)])
    return Figure(
        what=f"{name}, k2_window_tolerance={tolerance}",
        measured=100 * float((errors < (tolerance or LIMIT)).double().mean()),
        unit=f"% of windows miss less than {tolerance or LIMIT} of the running norm",
        details={
            "middle": float(errors.median()),
            "95 %": float(errors.quantile(0.95)),
            "99 %": float(errors.quantile(0.99)),
            "worst": float(errors.max()),
            "windows": len(errors),
            "mean k2": sum(sizes) / len(sizes),
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
        for tolerance in (None, LIMIT):
            figures.append(figure_of(name, make, arguments.windows, tolerance))
            print(figures[-1].line(), flush=True)
    publish("auto_k2_windows", figures, arguments)


if __name__ == "__main__":
    main()
