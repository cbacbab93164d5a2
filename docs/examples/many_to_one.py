"""One label for a whole sequence: which of two signs comes more often in 300 steps.

The label stands at every step and has a weight at the last one alone, so that each sequence is
one update, which reaches back to its first step (`k2=None`).

    $ python docs/examples/many_to_one.py
    right answers 100.0 %, by chance 50 %; peak 1.01 MiB, with all steps retained 13.05 MiB

Elsewhere within 8 %.
"""

import torch
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, TensorSequence

STEPS, LANES = 300, 64


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.readout = nn.GRU(1, 16), nn.Linear(16, 1)
        with torch.no_grad():  # update gates that keep: some 50 steps
            self.gru.bias_hh_l0[16:32] = 4.0

    def forward(self, x: Tensor, state):  # [T, B, 1] -> [T, B, 1]
        y, state = self.gru(x, state)
        return self.readout(y), state


def batch() -> TensorSequence:
    """Random signs [STEPS, LANES, 1], 6 of 10 of which are those of the label, at the last step."""
    label = torch.randint(0, 2, (LANES, 1)).float()
    signs = (torch.rand(STEPS, LANES, 1) < 0.4 + 0.2 * label) * 2.0 - 1.0
    at_the_end = torch.arange(STEPS) == STEPS - 1
    return TensorSequence(signs, label.expand(STEPS, LANES, 1), weight=at_the_end)


def right(model: Classifier, batches: int = 10) -> float:
    """Right answers in percent, on sequences that were not trained on."""
    with torch.no_grad():
        tests = [batch() for _ in range(batches)]
        found = [(model(t.inputs, None)[0][-1] > 0) == (t.targets[-1] > 0) for t in tests]
    return 100 * torch.cat(found).float().mean().item()


def trained(strategy: str, batches: int) -> tuple[float, float]:
    """Right answers in percent, and the peak of tensor memory in MiB."""
    torch.manual_seed(0)
    model = Classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    tbptt = TBPTT(
        model,
        nn.BCEWithLogitsLoss(),
        k1=STEPS,
        k2=None,
        optimizer=optimizer,
        per_step=False,
        strategy=strategy,
        measure_memory=True,
    )
    peaks = [tbptt.train(batch()).peak_bytes for _ in range(batches)]
    return right(model), max(peaks) / 2**20


def main(batches: int = 40) -> str:
    (answers, peak), (_, retained) = trained("sqrt", batches), trained("retain", 1)
    return (
        f"right answers {answers:.1f} %, by chance 50 %; "
        f"peak {peak:.2f} MiB, with all steps retained {retained:.2f} MiB"
    )


if __name__ == "__main__":
    print(main())
