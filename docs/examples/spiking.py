"""A spiking network of snnTorch learns in which half of its inputs spikes come early.

Neurons keep their potentials on themselves (`init_hidden=True`), and `lifted` makes them a state.
Both halves fire equally often, so that counts of spikes say nothing of the label: only their
order does.

    $ pip install snntorch
    $ python docs/examples/spiking.py
    state found in layers.1.mem, layers.3.mem; right answers 100.0 %, by chance 50 %

Elsewhere within 5 %.
"""

import snntorch
import torch
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, TensorSequence, evaluate
from tbptt_ckpt.module import lifted

STEPS, LANES, TRAINS = 60, 32, 10


class Network(nn.Module):
    """Spikes in, potentials of the last neurons out: [B, TRAINS] to [B, 2]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(TRAINS, 32),
            snntorch.Leaky(beta=0.9, init_hidden=True),
            nn.Linear(32, 2),
            snntorch.Leaky(beta=0.9, init_hidden=True, output=True, reset_mechanism="none"),
        )

    def forward(self, spikes: Tensor) -> Tensor:
        return self.layers(spikes)[1]


def batch() -> TensorSequence:
    """One half of the trains fires ever more rarely, the other ever more often."""
    label = torch.randint(0, 2, (LANES,))
    early = (torch.arange(TRAINS) % 2 == label[:, None]).float()  # [B, TRAINS]
    time = torch.arange(STEPS)[:, None, None] / (STEPS - 1)
    spikes = torch.rand(STEPS, LANES, TRAINS) < 0.4 * (early * (1 - time) + (1 - early) * time)
    at_the_end = torch.arange(STEPS) == STEPS - 1
    return TensorSequence(spikes.float(), label.expand(STEPS, LANES), weight=at_the_end)


def wrong(potentials: Tensor, labels: Tensor):
    """A loss for `evaluate`: the number of wrong answers, and of answers."""
    answers = potentials.argmax(1)
    return (answers != labels).sum(), torch.tensor(float(len(labels)))


def main(batches: int = 25) -> str:
    torch.manual_seed(0)
    net = Network()
    step = lifted(net, torch.zeros(LANES, TRAINS))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    tbptt = TBPTT(step, nn.CrossEntropyLoss(), STEPS, None, optimizer, strategy="sqrt")
    for _ in range(batches):
        tbptt.train(batch())
    errors = [evaluate(step, wrong, batch()).loss for _ in range(5)]
    right = 100 - 100 * sum(errors) / len(errors)
    return f"state found in {', '.join(step.names)}; right answers {right:.1f} %, by chance 50 %"


if __name__ == "__main__":
    print(main())
