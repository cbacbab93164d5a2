"""Trains within budgets while a preloaded library counts the tensor allocator's own calls.

    LD_PRELOAD=tensor_counter.so python metered_from_outside.py SOURCE/STRATEGY...

Prints, as JSON lines, for each case and module: the budget, the highest total of live
tensor bytes in each window, and the largest single allocation. The package's own meter has no part
in the count, and nothing is collected by hand. What a source holds for itself is not the run's.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, ArraySequence, BurnIn, LaneSource, Recurrent, TensorSequence

STEPS, LANES, WIDTH_IN, WIDTH, K1, K2 = 256, 8, 32, 64, 32, 100
BUDGETS = {"cell": 1_900_000, "layer": 2_000_000, "parts": 1_900_000}
MODULES: dict[str, Callable[[], nn.Module]] = {
    "cell": lambda: nn.LSTMCell(WIDTH_IN, WIDTH),
    "layer": lambda: nn.LSTM(WIDTH_IN, WIDTH),
    "parts": lambda: Recurrent(
        nn.GRUCell(WIDTH, WIDTH), nn.Linear(WIDTH_IN, WIDTH), nn.Linear(WIDTH, WIDTH)
    ),
}


class Copies:
    """A source as any loader is: every read is new memory."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self._inputs, self._targets = inputs, targets

    def __len__(self) -> int:
        return len(self._inputs)

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        return self._inputs[start:stop].clone(), self._targets[start:stop].clone()


class Weighted(Copies):
    """The same with weights and resets of lanes, made anew as well."""

    def weights(self, start: int, stop: int) -> Tensor:
        return torch.ones(stop - start, LANES, dtype=torch.float64)

    def resets(self, start: int, stop: int) -> Tensor:
        return (torch.arange(start, stop)[:, None] + torch.arange(LANES)) % 37 == 0


class Stream:
    """The same without a length: read in order, up to its end."""

    def __init__(self, source: Copies) -> None:
        self._source = source
        if hasattr(source, "weights"):
            self.weights, self.resets = self._weights, self._resets

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        return self._source.read(start, stop)

    def _weights(self, start: int, stop: int) -> Tensor:
        return self._source.weights(start, min(stop, STEPS))

    def _resets(self, start: int, stop: int) -> Tensor:
        return self._source.resets(start, min(stop, STEPS))


def steps(inputs: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for step in range(len(inputs)):
        yield inputs[step].clone(), targets[step].clone()


def in_lanes(inputs: Tensor, targets: Tensor) -> LaneSource:
    lanes = [TensorSequence(x, y) for x, y in zip(inputs.unbind(1), targets.unbind(1), strict=True)]
    return LaneSource(lanes + lanes[:5], lanes=LANES)


class Dataset(torch.utils.data.Dataset):
    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self._inputs, self._targets = inputs, targets

    def __len__(self) -> int:
        return len(self._inputs)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        return self._inputs[step], self._targets[step]


SOURCES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tensors": TensorSequence,
    "weighted tensors": lambda x, y: TensorSequence(
        x, y, weight=torch.ones(STEPS, LANES), resets=torch.rand(STEPS, LANES) < 0.02
    ),
    "copies": Copies,
    "weighted copies": Weighted,
    "lanes": in_lanes,
    "arrays": lambda x, y: ArraySequence(x.numpy(), y.numpy()),
    "converted arrays": lambda x, y: ArraySequence(
        x.double().numpy(), y.double().numpy(), dtype=x.dtype, target_dtype=x.dtype
    ),
    "burn in": lambda x, y: BurnIn(Weighted(x, y), 3),
    "generator": steps,
    "list": lambda x, y: list(zip(x.unbind(), y.unbind(), strict=True)),
    "gaps": lambda x, y: ((a, None if i % 5 == 0 else b) for i, (a, b) in enumerate(steps(x, y))),
    "stream": lambda x, y: Stream(Copies(x, y)),
    "weighted stream": lambda x, y: Stream(Weighted(x, y)),
    "loader": lambda x, y: torch.utils.data.DataLoader(Dataset(x, y), batch_size=None),
}

counter = ctypes.CDLL(None)
for name in ("tensor_bytes_peak", "tensor_bytes_live", "tensor_bytes_largest"):
    getattr(counter, name).restype = ctypes.c_int64


def measured(source_kind: str, module_kind: str, strategy: str) -> Any:
    """One training: its budget, the peak of each window, and the largest block."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(STEPS, LANES, WIDTH_IN), torch.randn(STEPS, LANES, WIDTH)
    source, budget = SOURCES[source_kind](inputs, targets), BUDGETS[module_kind]
    others = counter.tensor_bytes_live()
    module = MODULES[module_kind]()
    optimizer = torch.optim.Adam(module.parameters())
    loss_fn = nn.functional.mse_loss
    tbptt = TBPTT(module, loss_fn, K1, K2, optimizer, strategy=strategy, memory_budget=budget)
    counter.tensor_bytes_peak(), counter.tensor_bytes_largest()
    peaks = [counter.tensor_bytes_peak() - others for _ in tbptt.windows(source)]
    row = {"source": source_kind, "module": module_kind, "strategy": strategy, "budget": budget}
    return row | {"peaks": peaks, "largest": counter.tensor_bytes_largest()}


def main(cases: list[str]) -> None:
    torch.set_num_threads(1)
    for case in cases:
        for module in MODULES:
            print(json.dumps(measured(case.split("/")[0], module, case.split("/")[1])), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
