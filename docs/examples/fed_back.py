"""Output fed back as input: a run that goes on alone takes a gradient through all of it.

It learns to walk on a circle: first from given points (teacher forcing), then alone, from its own
last point to the next one. A window begins where the one before has drifted to, and asks for a
place that cannot be reached from there; so short windows do harm, in a run that nothing sets
right. `k2=None`, with `k1` as long as the run, is full backpropagation, from each point back to
the first.

    $ python docs/examples/fed_back.py
    squared error of a run alone: 0.325 from given points, 0.014 after whole runs, 0.090 after
    windows of 50 steps

Elsewhere within 30 %.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from tbptt_ckpt import TBPTT

STEPS, LANES = 100, 16


class Generator(nn.Module):
    """From a given point [B, 2], or else its own last one, which is the state, to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2))

    def forward(self, given: Tensor | None, y: Tensor):
        y = self.net(y if given is None else given)
        return y, y


def circle() -> Tensor:
    """[STEPS + 1, LANES, 2]: four times around, each lane from another point."""
    angle = (torch.rand(LANES) + torch.arange(STEPS + 1)[:, None] / 25) * 2 * math.pi
    return torch.stack([angle.sin(), angle.cos()], dim=-1)


def free_error(k1: int, k2: int | None, updates: int) -> float:
    """Squared error of a run alone, after so many updates of that kind."""
    torch.manual_seed(0)
    model = Generator()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    led = TBPTT(model, nn.MSELoss(), 25, 25, optimizer, strategy="retain")
    for _ in range(8):
        points = circle()
        led.train(pairwise(points), init_state=points[0])

    optimizer.param_groups[0]["lr"] = 0.003
    alone = TBPTT(model, nn.MSELoss(), k1, k2, optimizer, strategy="sqrt", clip_grad_norm=0.1)
    for _ in range(updates * k1 // STEPS):
        points = circle()
        alone.train([(None, point) for point in points[1:]], init_state=points[0])
    points = circle()
    return alone.evaluate([(None, point) for point in points[1:]], init_state=points[0]).loss


def main(updates: int = 60) -> str:
    whole, windows = free_error(STEPS, None, updates), free_error(25, 50, updates)
    return (
        f"squared error of a run alone: {free_error(STEPS, None, 0):.3f} from given points, "
        f"{whole:.3f} after whole runs, {windows:.3f} after windows of 50 steps"
    )


if __name__ == "__main__":
    print(main())
