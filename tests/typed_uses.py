"""What a user writes, held against the package's types by mypy and basedpyright.

A line that ends in `# wrong` is to be seen by both, every other one to pass.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from tbptt_ckpt import (
    TBPTT,
    Batches,
    Snapshots,
    TensorSequence,
    Trainer,
    Uniform,
    Validation,
    evaluate,
    plan,
    profile_strategies,
    unroll,
)
from tbptt_ckpt.schedule import Differentiate, parse_strategy
from tbptt_ckpt.trainer import JsonLines


class Signal:
    """A source of the user's own."""

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        steps = torch.zeros(stop - start, 4, 8)
        return steps, steps


def steps() -> Iterator[tuple[Tensor, Tensor | None]]:
    yield torch.zeros(4, 8), None


def cell(inputs: Tensor, state: tuple[Tensor, int]) -> tuple[Tensor, tuple[Tensor, int]]:
    return inputs + state[0], state


def of_epoch(epoch: int) -> Signal:
    return Signal()


x, lstm, text = torch.zeros(10, 4, 8), nn.LSTM(8, 8), input()
adam = torch.optim.Adam(lstm.parameters())

tbptt = TBPTT(lstm, mse_loss, 2, 4, adam)
tbptt = TBPTT(lstm, nn.MSELoss(), 2, None, adam, strategy="sqrt", memory_budget="512MiB")
tbptt = TBPTT(lstm, mse_loss, k1=2, k2=4, strategy=Uniform(5), memory_budget=0.5)
tbptt = TBPTT(lstm, mse_loss, 2, 4, strategy=parse_strategy(text), memory_budget=2**30)
tbptt = TBPTT(lstm, mse_loss, 2, 4, strategy=[Differentiate(0, 4)], overlap="stale")
tbptt = TBPTT(cell, mse_loss, 2, 4, executor="checkpoint", time_batching=False, per_step=True)

tbptt = TBPTT(lstm, mse_loss, 2, 4, adam, strategy="unifrom:5")  # wrong
tbptt = TBPTT(lstm, mse_loss, 2, 4, adam, strategy="squirt")  # wrong
tbptt = TBPTT(lstm, mse_loss, 2, 4, adam, overlap="refrsh")  # wrong
tbptt = TBPTT(lstm, mse_loss, 2, 4, adam, executor="rply")  # wrong
tbptt = TBPTT(lstm, mse_loss, 2, 4, adam, memory_budget=[1])  # wrong
tbptt = TBPTT(lstm, mse_loss, 2, 4, adam, time_batching="of")  # wrong
tbptt = TBPTT(lstm, mse_loss, 2, 4, "adam")  # wrong
tbptt = TBPTT(lstm, mse_loss, 2, 4, adam, loss="newest")  # wrong
tbptt = TBPTT(lstm, mse_loss, 2, 4, adam, "sqrt")  # wrong

result = tbptt.train(TensorSequence(x, x))
result = tbptt.train(Signal(), init_state=(x[:1], x[:1]))
result = tbptt.train([(x[0], None), (x[1], x[1])])
result = tbptt.train(zip(x, x, strict=True))
result = tbptt.train(steps())
result = tbptt.train(3)  # wrong
loss: float | None = evaluate(lstm, mse_loss, TensorSequence(x, x)).loss
evaluation = evaluate(lstm, mse_loss, text)  # wrong

trainer = Trainer(tbptt, Signal(), snapshots=Snapshots(directory="runs/a"))
trainer = Trainer(tbptt, of_epoch, epochs=3, events=[JsonLines("events.jsonl")])
batches = Batches([(x, x)], time_dim=1)
trainer = Trainer(tbptt, batches, validation=Validation(source=batches, every_windows=5))
trainer = Trainer(tbptt, 3)  # wrong
trainer = Trainer(tbptt, batches, validation=batches)  # wrong
result = tbptt.train(batches)  # wrong
report = profile_strategies(lstm, mse_loss, x, x, k1=2, k2=4, strategies=["sqrt", Uniform(2)])
report = profile_strategies(lstm, mse_loss, x, x, k1=2, k2=4, strategies=["squirt"])  # wrong
windows = [float(window.seconds) for window in trainer.windows()]

outputs, state = unroll(cell, x, (x[0], 0), per_step=True, strategy="sqrt")
count: int = outputs.dim() + state[1]
count = unroll(cell, x, (x[0], 0))[1][0]  # wrong
outputs, state = unroll(cell, x, x[0])  # wrong
result_of_lstm: Tensor = unroll(lstm, x)[0]

costs = tbptt.options.costs
if costs is not None:
    planned = plan(10, costs, strategy="unifrom:5")  # wrong
