"""What does stopping gradients by lot cost, and what does it save?

Seven small nets in float64: how far off the last window's gradient is when it is cut at each
border, and from that, exactly, what `Roulette` takes against the whole walk. Then the time of
whole windows of an `LSTMCell` loop, over draws that are spread evenly over [0, 1).

    python -m benchmarks.roulette
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.report import Figure, add_output_arguments, publish
from tbptt_ckpt import TBPTT, ArgumentError, TensorSequence
from tbptt_ckpt.errors import TbpttWarning
from tbptt_ckpt.schedule import Roulette, RoulettePrice, fitted_roulette, roulette_price

WIDTH, LANES, K1, K2 = 12, 4, 20, 320
CONSTANTS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
ADVANCE = 0.24  # of a whole window's time, as the second part measures it


def _forgetting(bias: float) -> nn.LSTMCell:
    cell = nn.LSTMCell(WIDTH, WIDTH)
    with torch.no_grad():
        cell.bias_ih[WIDTH : 2 * WIDTH] += bias
    return cell


def _exploding() -> nn.RNNCell:
    cell = nn.RNNCell(WIDTH, WIDTH)
    with torch.no_grad():
        cell.weight_hh.mul_(4.5)
    return cell


# Each makes a cell, and says whether lanes begin anew in 2 % of the steps.
NETS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "RNNCell": (lambda: nn.RNNCell(WIDTH, WIDTH), False),
    "GRUCell": (lambda: nn.GRUCell(WIDTH, WIDTH), False),
    "LSTMCell": (lambda: nn.LSTMCell(WIDTH, WIDTH), False),
    "LSTMCell, forget bias +2": (lambda: _forgetting(2.0), False),
    "LSTMCell, forget bias +5": (lambda: _forgetting(5.0), False),
    "LSTMCell, forget bias +2, resets": (lambda: _forgetting(2.0), True),
    "RNNCell, exploding": (_exploding, False),
}


@dataclass(frozen=True)
class Evenly(Roulette):
    """As many windows draw numbers that are spread evenly, in a mixed order."""

    windows: int = 1

    def number(self, window: int) -> float:
        """The middle of one of as many equal parts."""
        return (window * 7 % self.windows + 0.5) / self.windows


def data_of(num_steps: int, *, resets: bool) -> TensorSequence:
    """Noise, of whose targets only those of the last k1 steps count."""
    generator = torch.Generator().manual_seed(3)
    kind: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    x, y = (torch.randn(num_steps, LANES, WIDTH, **kind) for _ in range(2))
    weight = torch.zeros(num_steps, dtype=torch.float64)
    weight[-K1:] = 1
    begins = torch.rand(num_steps, LANES, **kind) < 0.02 if resets else None
    return TensorSequence(x, y, weight=weight, resets=begins)


def gradient(cell: nn.Module, data: TensorSequence, k2: int, truncation: Any = "fixed") -> Tensor:
    """Of the last window, reaching back k2 steps."""
    cell.zero_grad()
    tbptt = TBPTT(cell, F.mse_loss, K1, k2, truncation=truncation, strategy="uniform:20")
    for _ in tbptt.windows(data):
        pass
    return torch.cat([p.grad.reshape(-1) for p in cell.parameters() if p.grad is not None])


def errors_of(cell: nn.Module, data: TensorSequence) -> list[float]:
    """How far off the gradient is when it is cut at each border, from the new steps back."""
    whole = gradient(cell, data, K2)
    cuts = [gradient(cell, data, reach) for reach in range(K1, K2, K1)]
    return [float((whole - cut).norm() / whole.norm()) for cut in cuts]


def law_error(cell: nn.Module, data: TensorSequence) -> float:
    """The mean over all draws against the whole gradient, by what is really run."""
    roulette, whole = Roulette(0.8), gradient(cell, data, K2)
    mean, crossed = torch.zeros_like(whole), 1.0
    borders = K2 // K1 - 1
    for border in range(borders + 1):
        further = crossed * 0.8 if border < borders else 0.0
        drawn = _Fixed(roulette.survival, drawn=(crossed + further) / 2)
        mean += (crossed - further) * gradient(cell, data, K2, drawn)
        crossed = further
    return float((mean - whole).norm() / whole.norm())


@dataclass(frozen=True)
class _Fixed(Roulette):
    """All windows draw the same number."""

    drawn: float = 0.0

    def number(self, window: int) -> float:
        """That number."""
        return self.drawn


def is_told_of(cell: nn.Module) -> bool:
    """Whether training warns that the gradient grows with distance."""
    data = data_of(2 * K2, resets=False)
    data = TensorSequence(data.inputs, data.targets)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TbpttWarning)
        tbptt = TBPTT(cell, F.mse_loss, K1, K2, truncation=Roulette(0.8))
        for _ in tbptt.windows(data):
            cell.zero_grad()
    return any("grows with distance" in str(each.message) for each in caught)


def net_figures(names: list[str]) -> Iterator[Figure]:
    """One for each net: the work of the best constant against the whole walk's."""
    for name in names:
        make, resets = NETS[name]
        torch.manual_seed(0)
        cell, data = make().double(), data_of(K2, resets=resets)
        errors = errors_of(cell, data)
        prices = {p: roulette_price(Roulette(p), errors) for p in CONSTANTS}
        best = min(prices, key=lambda p: prices[p].work)
        details = {
            "p": best,
            "cost": prices[best].cost,
            "sd": prices[best].variance ** 0.5,
            "cut at a quarter off by": errors[len(errors) // 4],
            "law off by": law_error(cell, data),
            "warned": float(is_told_of(cell)),
            **_fitted(errors),
        }
        yield Figure(f"{name}, best constant", prices[best].work, "of the work", details=details)


def _fitted(errors: list[float]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, advance in (("", 0.0), (" refresh", ADVANCE)):
        try:
            roulette = fitted_roulette(errors, advance=advance)
        except ArgumentError:
            continue
        price: RoulettePrice = roulette_price(roulette, errors, advance=advance)
        found |= {f"fitted{name} work": price.work, f"fitted{name} sd": price.variance**0.5}
    return found


class Loop(nn.Module):
    """An `LSTMCell` that gives its hidden state."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(width, width)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One step."""
        h, c = self.cell(x, state)
        return h, (h, c)


def window_seconds(overlap: Any, truncation: Any, arguments: argparse.Namespace) -> float:
    """Mean of the windows that may reach all the way."""
    k1, k2, windows = arguments.k1, arguments.k2, arguments.windows
    torch.manual_seed(0)
    module = Loop(arguments.width)
    steps = k2 + k1 * windows
    x, y = (torch.randn(steps, arguments.lanes, arguments.width) for _ in range(2))
    tbptt = TBPTT(
        *(module, F.mse_loss, k1, k2, torch.optim.SGD(module.parameters(), 1e-3)),
        overlap=overlap,
        truncation=truncation,
        strategy=f"uniform:{k1}",
    )
    seconds = []
    begun = time.perf_counter()
    for window in tbptt.windows(TensorSequence(x, y)):
        ended = time.perf_counter()
        if window.stop > k2:
            seconds.append(ended - begun)
        begun = ended
    return sum(seconds) / len(seconds)


def time_figures(arguments: argparse.Namespace) -> Iterator[Figure]:
    """Whole windows against those that always reach all the way, in turn."""
    windows, borders = arguments.windows, arguments.k2 // arguments.k1 - 1
    survival = arguments.survival
    walked = sum(survival**border for border in range(borders + 1)) / (borders + 1)
    ways = {
        "fixed": "fixed",
        "drawn": Evenly(survival, windows=windows),
        "nothing crossed": _Fixed(survival, drawn=1 - 1e-9),
    }
    for overlap in ("refresh", "stale"):
        found: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(arguments.rounds):
            for name, truncation in ways.items():
                found[name].append(window_seconds(overlap, truncation, arguments))
        ratios = {
            name: sorted(a / b for a, b in zip(each, found["fixed"], strict=True))
            for name, each in found.items()
        }
        drawn = ratios["drawn"]
        yield Figure(
            f"window, {overlap} overlap, roulette:{survival}",
            drawn[len(drawn) // 2],
            "of the time",
            interval=(drawn[0], drawn[-1]),
            details={
                "steps differentiated": walked,
                "nothing crossed": sorted(ratios["nothing crossed"])[len(drawn) // 2],
                "whole s": min(found["fixed"]),
            },
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--k1", type=int, default=50)
    parser.add_argument("--k2", type=int, default=1000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--lanes", type=int, default=16)
    parser.add_argument("--windows", type=int, default=20, help="of which each has its own draw")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--survival", type=float, default=0.8)
    parser.add_argument("--only", choices=("nets", "times"), help="one part of it")
    add_output_arguments(parser, threads=1)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.k1, arguments.k2, arguments.windows, arguments.rounds = 10, 40, 2, 1
    return arguments


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    names = list(NETS)[-1:] if arguments.quick else list(NETS)
    figures = []
    for part, made in (("nets", net_figures(names)), ("times", time_figures(arguments))):
        for figure in made if arguments.only in (None, part) else ():
            print(figure.line(), flush=True)
            figures.append(figure)
    publish("roulette", figures, arguments, interval_is="lowest to highest")


if __name__ == "__main__":
    main()
