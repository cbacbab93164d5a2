"""A neural cellular automaton that keeps what it has grown, since windows go on where it stands.

Cells see their neighbours and change by one rule, which is learned: from a single cell to a
picture. An automaton that is trained on its first 16 steps draws the picture and destroys it soon
after. With as many updates over windows that go on from the cells that the one before left, of
lanes that begin anew one after the other, it stays.

    $ python docs/examples/cellular_automaton.py
    squared error at steps 16 and 1,000: 0.0 and 1.0 after runs of 16 steps, 0.0 and 0.0 after
    lives of 160

Elsewhere within 20 %; an error above 1 is told as 1.0.

Mordvintsev et al. (2020), doi:10.23915/distill.00023.
"""

import torch
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, BurnIn, TensorSequence

SIZE, CHANNELS = 8, 8
GROWTH, BURN_IN, LIFE, LANES = 16, 12, 160, 4
PICTURE = """
........ .##..##. .######. .######. .######. ..####.. ...##... ........
"""


class Automaton(nn.Module):
    """One step of all cells: [B, CHANNELS, SIZE, SIZE], of which the first channel is seen."""

    def __init__(self) -> None:
        super().__init__()
        self.see = nn.Conv2d(CHANNELS, 32, 3, padding=1)
        self.change = nn.Conv2d(32, CHANNELS, 1)
        nn.init.zeros_(self.change.weight)
        nn.init.zeros_(self.change.bias)

    def forward(self, _, cells: Tensor):
        cells = (cells + self.change(torch.relu(self.see(cells)))).clamp(-2, 2)
        return cells[:, 0], cells


def seed() -> Tensor:
    cells = torch.zeros(1, CHANNELS, SIZE, SIZE)
    cells[:, :, SIZE // 2, SIZE // 2] = 1.0
    return cells


def picture() -> Tensor:
    return torch.tensor([[[float(cell == "#") for cell in row] for row in PICTURE.split()]])


def trained_on_growth(updates: int) -> Automaton:
    """Each run begins with a single cell and ends when the picture should stand."""
    model, tbptt = learner()
    steps = [(None, picture() if step >= BURN_IN else None) for step in range(GROWTH)]
    for _ in range(updates):
        tbptt.train(steps, init_state=seed())
    return model


def trained_on_lives(updates: int) -> Automaton:
    """Four automata side by side, each of another age; one begins anew every 40 steps."""
    model, tbptt = learner()
    steps = torch.arange(GROWTH * updates)[:, None]
    resets = (steps + torch.arange(LANES) * LIFE // LANES) % LIFE == 0
    targets = picture().expand(len(steps), LANES, SIZE, SIZE)
    source = TensorSequence(torch.zeros(len(steps), LANES), targets, resets=resets)
    tbptt.train(BurnIn(source, BURN_IN), init_state=seed().repeat(LANES, 1, 1, 1))
    return model


def learner() -> tuple[Automaton, TBPTT]:
    torch.manual_seed(0)
    model = Automaton()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    tbptt = TBPTT(
        model, nn.MSELoss(), GROWTH, 2 * GROWTH, optimizer, strategy="retain", clip_grad_norm=1.0
    )
    return model, tbptt


def error(model: Automaton, steps: int) -> float:
    cells = seed()
    with torch.no_grad():
        for _ in range(steps):
            shown, cells = model(None, cells)
    return min(1.0, nn.functional.mse_loss(shown, picture()).item())


def main(updates: int = 250) -> str:
    growth, lives = trained_on_growth(updates), trained_on_lives(updates)
    figures = [f"{error(model, at):.1f}" for model in (growth, lives) for at in (GROWTH, 1_000)]
    return (
        "squared error at steps 16 and 1,000: {} and {} after runs of 16 steps, "
        "{} and {} after lives of 160".format(*figures)
    )


if __name__ == "__main__":
    print(main())
