"""A language model of bytes: one text in 32 lanes, whose states go on from update to update.

A short training on the source of Python's own library, and a look at a part that was not
trained on. It is held against the best that can be said of a byte from the one before alone, with
that part's own frequencies. `tbptt-ckpt train` is the same with all that a long run needs.

    $ python docs/examples/bytes_model.py
    2.83 bits a byte, from the byte before alone 3.00 at best

Elsewhere within 10 %; another version of Python has another text.
"""

import math
import sysconfig
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, ArraySequence, LaneSource

LANES = 32


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(256, 32), nn.LSTM(32, 96)
        self.readout = nn.Linear(96, 256)

    def forward(self, tokens: Tensor, state):  # [T, B] -> [T, B, 256]
        y, state = self.lstm(self.embed(tokens), state)
        return self.readout(y), state


def loss_fn(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def text(num_bytes: int) -> np.ndarray:
    """The begin of the sources of Python's library."""
    library = Path(sysconfig.get_paths()["stdlib"])
    found = b"".join(path.read_bytes() for path in sorted(library.glob("*.py")))
    return np.frombuffer(found[:num_bytes], dtype=np.uint8)


def entropy(counts: np.ndarray) -> float:
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log2(p)).sum())


def main(num_bytes: int = 600_000) -> str:
    torch.manual_seed(0)
    train, test = np.split(text(num_bytes), [num_bytes * 9 // 10])
    source = LaneSource(ArraySequence(train, next_step=True, dtype=torch.int64), lanes=LANES)
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    tbptt = TBPTT(
        model, loss_fn, 50, 100, optimizer, per_step=False, strategy="retain", clip_grad_norm=1.0
    )
    tbptt.train(source)
    other = LaneSource(ArraySequence(test, next_step=True, dtype=torch.int64), lanes=LANES)
    bits = tbptt.evaluate(other).loss / math.log(2)
    pairs = np.bincount(test[:-1].astype(int) * 256 + test[1:], minlength=256 * 256)
    single = entropy(np.bincount(test))
    after_another = entropy(pairs) - single
    return f"{bits:.2f} bits a byte, from the byte before alone {after_another:.2f} at best"


if __name__ == "__main__":
    print(main())
