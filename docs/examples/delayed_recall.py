"""Delayed recall: an update every 6 steps learns what lies 12 steps back if it reaches 18 back.

One of 8 cues is shown, and asked for 12 steps later; noise stands between. Weights that read cues
start at zero, and can leave it only by a gradient that reaches from an answer to its cue. A reach
of 12 is one step short. docs/delayed_recall.md has the whole table.

    $ python docs/examples/delayed_recall.py
    right answers with k1=6, k2=18: 100.0 %, with k1=6, k2=12: 12.3 %

Elsewhere within 8 %.
"""

import torch
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, TensorSequence

CUES, DELAY, LANES = 8, 12, 32
QUESTION = 2 * CUES  # after cues and noise; codes are one more


class Recaller(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.readout = nn.LSTM(QUESTION + 1, 48), nn.Linear(48, CUES)
        with torch.no_grad():
            self.lstm.weight_ih_l0[:, :CUES] = 0.0
            self.lstm.bias_ih_l0[48:96] = 1.0  # forget gates start open

    def forward(self, codes: Tensor, state):  # [T, B] -> [T, B, CUES]
        hidden, state = self.lstm(nn.functional.one_hot(codes, QUESTION + 1).float(), state)
        return self.readout(hidden), state


def stream(steps: int) -> TensorSequence:
    """Episodes after random pauses; only answers have a weight."""
    codes = torch.randint(CUES, 2 * CUES, (steps, LANES))
    targets, weight = torch.zeros_like(codes), torch.zeros(steps)
    step = 0
    while step + DELAY < steps:
        cue = torch.randint(0, CUES, (LANES,))
        codes[step], codes[step + DELAY] = cue, QUESTION
        targets[step + DELAY], weight[step + DELAY] = cue, 1.0
        step += DELAY + 1 + int(torch.randint(0, DELAY // 2, ()))
    return TensorSequence(codes, targets, weight=weight)


def loss_fn(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def right_answers(k1: int, k2: int, steps: int) -> float:
    """In percent, on a stream that was not trained on."""
    torch.manual_seed(0)
    model = Recaller()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    tbptt = TBPTT(
        model, loss_fn, k1, k2, optimizer, per_step=False, strategy="retain", clip_grad_norm=1.0
    )
    tbptt.train(stream(steps))
    other = stream(2_000)
    with torch.no_grad():
        right = (model(other.inputs, None)[0].argmax(-1) == other.targets).float().mean(1)
    return 100 * right[other.weight > 0].mean().item()


def main(steps: int = 6_500) -> str:
    far, near = right_answers(6, 18, steps), right_answers(6, 12, steps)
    return f"right answers with k1=6, k2=18: {far:.1f} %, with k1=6, k2=12: {near:.1f} %"


if __name__ == "__main__":
    print(main())
