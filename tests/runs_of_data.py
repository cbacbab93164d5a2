"""Runs over the same data, however it is brought."""

from __future__ import annotations

from typing import Any

from cases import WIDTH, WIDTH_IN, lstm, mean_loss, tanh_cell
from models_for_tests import Seen, moving, observe
from torch import Tensor, nn

from tbptt_ckpt import TBPTT

NUM_STEPS = 13
REACHES = ((3, 7), (3, 2), (4, None), (2, 2))
RECURRENT = ("cell", "lstm")


def make_module(kind: str) -> nn.Module:
    return lstm() if kind == "lstm" else tanh_cell()


def run(
    module: nn.Module,
    sequence: object,
    k1: int = 3,
    k2: int | None = 7,
    *,
    loss_fn: Any = mean_loss,
    init_state: Any = None,
    most: int | None = None,
    **options: Any,
) -> list[Seen]:
    """Windows of a run whose weights move."""
    options = {"strategy": "uniform:2"} | options
    tbptt = TBPTT(module, loss_fn, k1, k2, moving(module), **options)
    return observe(tbptt, sequence, init_state, parameters=module.parameters(), most=most)


def steps_of(inputs: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(inputs, targets, strict=True))


class OpenSource:
    """A source without a length: a short read, or none at all, marks its end."""

    time_dim = 0

    def __init__(self, inputs: Tensor, targets: Tensor, weight: Tensor | None = None) -> None:
        self.inputs, self.targets, self.weight = inputs, targets, weight
        self.reads: list[tuple[int, int]] = []

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        self.reads.append((start, stop))
        return self.inputs[start:stop], self.targets[start:stop]


class Source(OpenSource):
    def __len__(self) -> int:
        return len(self.inputs)


class WeightedOpenSource(OpenSource):
    def weights(self, start: int, stop: int) -> Tensor:
        return self.weight[start:stop]


class WeightedSource(Source):
    def weights(self, start: int, stop: int) -> Tensor:
        return self.weight[start:stop]


def batch_first_lstm() -> nn.LSTM:
    module = nn.LSTM(WIDTH_IN, WIDTH, batch_first=True).double()
    module.load_state_dict(lstm().state_dict())
    return module


def with_targets_at(present: set[int], inputs: Tensor, targets: Tensor) -> list[tuple[Any, Any]]:
    return [(x, y if t in present else None) for t, (x, y) in enumerate(steps_of(inputs, targets))]
